"""The reward `judge`: an OpenAI-compatible server gives each answer a number from 0 to 1. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class JudgeSpec:
    """Who judges, and how often it may be asked; each field is a flag `--judge_NAME`.

    Attributes:
        endpoint: like http://host:8000/v1.
        model_name: what the server calls the model.
        key_variable: environment variable with the key; OPENAI_API_KEY where it is set and none is named.
        prompt: text template with {question}, {reference} and {answer}; None: the one that comes along.
        parallel: requests at a time, of each rank.
        timeout: seconds for one request.
        tries: requests for one reply, at most.
        limit_key: how the server calls max_new_tokens.
        most: replies that a rank may ask for in a run; None: any number.
        cache: folder that keeps what was judged, so that the same answer is not asked about again.
    """

    endpoint: str
    model_name: str
    key_variable: str | None = None
    prompt: Path | None = None
    parallel: int = 8
    timeout: float = 60.0
    tries: int = 6
    max_new_tokens: int = 512
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    most: int | None = None
    cache: Path | None = None


class Judge:
    """Asks the server."""

    def __init__(self, spec: JudgeSpec):
        raise NotImplementedError

"""What an older DeepSpeed cannot do is refused before the start; what it does wrongly is kept from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mirage_ds.engine import versions
from mirage_ds.engine.ds_config import KEYS
from mirage_ds.engine.versions import check_release, gather_safely
from mirage_ds.errors import UserError

HERE = Path("ds.json")
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}
ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
NEW = "0.19.8"


def installed(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(versions, "version", {"deepspeed": release}.__getitem__)


def test_every_key_of_the_table_is_a_known_one() -> None:
    assert KEYS["since"].keys() <= set(KEYS["known"])


@pytest.mark.parametrize(
    ("release", "values", "frozen", "said"),
    [
        (
            *("0.18.9", {"log_level": "info"}, False),
            "ds.json: DeepSpeed 0.18.9 would ignore 'log_level'; install deepspeed>=0.19.3",
        ),
        ("0.19.3", {"log_level": "info"}, False, None),
        ("0.19.10", {"log_level": "info", "disable_python_gc": True}, False, None),
        (
            *("0.19.3", ZERO3, True),
            "--lora_rank: DeepSpeed 0.19.3 cannot recompute layers with frozen weights under ZeRO-3 (ds.json); install "
            "deepspeed>=0.19.4, or use --no_gradient_checkpointing",
        ),
        ("0.19.3", ZERO3, False, None),
        ("0.19.3", ZERO2, True, None),
        ("0.19.4", ZERO3, True, None),
        ("0.20.0", ZERO3, True, None),
    ],
)
def test_what_a_release_lacks_is_refused_in_one_sentence(
    release: str, values: dict[str, Any], frozen: bool, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, release)
    if said is None:
        check_release(values, HERE, frozen)
        return
    with pytest.raises(UserError) as refused:
        check_release(values, HERE, frozen)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("release", "stage", "device", "one_by_one"),
    [
        ("0.19.7", 3, "cpu", True),
        ("0.18.9", 3, "cpu", True),
        (NEW, 3, "cpu", False),
        ("0.19.7", 3, "cuda", False),
        ("0.19.7", 2, "cpu", False),
    ],
)
def test_old_releases_gather_one_parameter_at_a_time_on_the_cpu(
    release: str, stage: int, device: str, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That the numbers are right then, tests/dist shows in the oldest environment (tests/versions).
    installed(monkeypatch, release)
    values: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    gather_safely(values, device)
    assert values["zero_optimization"].get("stage3_allgather_sequential", False) is one_by_one

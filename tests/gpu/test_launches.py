"""Kernels that a one-token pass starts, against the bound that launches.py derives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gpu.launches import MOST_A_OPERATOR, most_launches, of_one_pass, one_call
from mirage_ds.model.attention import BACKENDS

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KS = (2, 6)


@pytest.fixture(params=["flash", "torch_varlen"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed: this back end alone is left out")
    return request.param


def test_forward_starts_no_more_than_its_operators_need(nano: Path, mixed: Path, backend: str) -> None:
    layers = json.loads((nano / "config.json").read_text())["text_config"]["num_hidden_layers"]
    found = of_one_pass(nano, mixed, CUDA, backend, "loss", KS)
    print(f"{backend}: {found:.0f} launches a one-token pass of {layers} layers, at most {most_launches(layers)}")
    assert 0 < found <= most_launches(layers)


def test_backward_starts_no_more_than_two_an_operator(
    nano: Path, mixed: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "one_call", one_call)
    operators = of_one_pass(nano, mixed, CPU, "one_call", "step", KS)
    found = of_one_pass(nano, mixed, CUDA, backend, "step", KS)
    print(f"{backend}: {found:.0f} launches, {operators:.0f} operators, forward and backward of a one-token pass")
    assert 0 < found <= MOST_A_OPERATOR * operators

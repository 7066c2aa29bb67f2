"""What a start will compile, said before it does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mirage_ds.engine.compiled import extensions_folder, needed, waits


def config(torch_adam: bool = True, **zero: Any) -> dict[str, Any]:
    return {"optimizer": {"params": {"torch_adam": torch_adam}}, "zero_optimization": {"stage": 3, **zero}}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (config(), []),
        (config(torch_adam=False), ["fused_adam"]),
        (config(torch_adam=False, offload_optimizer={"device": "cpu"}), ["cpu_adam"]),
        (config(offload_optimizer={"device": "cpu"}), []),
        (config(offload_param=None, offload_optimizer={"device": "none"}), []),
    ],
)
def test_what_is_needed(values: dict[str, Any], names: list[str]) -> None:
    assert needed(values) == names


@pytest.mark.parametrize("below", ["", "py311_cpu"])
def test_a_missing_extension_a_lock_and_a_finished_one(below: str, tmp_path: Path) -> None:
    values = config(torch_adam=False, offload_optimizer={"device": "cpu"})
    (line,) = waits(values, tmp_path, "node1")
    assert line.startswith(f"node1: compiles DeepSpeed's cpu_adam into {tmp_path} first")
    place = tmp_path / below / "cpu_adam"
    place.mkdir(parents=True)
    (place / "lock").touch()
    os.utime(place / "lock", (1000, 1000))
    (line,) = waits(values, tmp_path, "node1", now=1900)
    assert line.startswith(f"node1: waits for {place / 'lock'}, 900 s old")
    (place / "lock").unlink()
    (place / "cpu_adam.so").touch()
    assert waits(values, tmp_path, "node1") == []


def test_torchs_folder_is_found_as_torch_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert extensions_folder(os.environ) == Path(get_default_build_root())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert extensions_folder(os.environ) == Path("/somewhere")

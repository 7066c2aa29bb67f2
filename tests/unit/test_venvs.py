"""Environments of other programs, linked to this one's torch."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from benchmarks import venvs


def test_torch_is_linked_anew_when_the_clone_it_came_from_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def uv(*words: str | Path) -> None:
        if words[0] == "venv":
            (Path(words[-1]) / "lib/python3.11/site-packages").mkdir(parents=True)

    monkeypatch.setattr(venvs, "uv", uv)
    place = venvs.build("trl").parents[1]
    torch = place / "lib/python3.11/site-packages/torch"
    torch.unlink()
    torch.symlink_to(tmp_path / "gone/torch")
    assert venvs.build("trl").parents[1] == place
    assert torch.resolve() == Path(str(importlib.metadata.distribution("torch").locate_file("torch"))).resolve()

"""`mirage-ds checkpoint`: what it refuses before DeepSpeed is asked; the comparison of what training never changes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirage_ds.cli import main
from mirage_ds.engine import universal
from mirage_ds.engine.frozen import check_same, digest
from mirage_ds.engine.manifest import Entry, entry_of, write_manifest
from mirage_ds.engine.universal import convert, needed_bytes, use_universal
from mirage_ds.errors import UserError


def fake_run(folder: Path, *steps: int, **state: Any) -> list[Path]:
    """A run whose checkpoints are whole, with shards that are none."""
    places = []
    for step in steps:
        place = folder / "run/checkpoints" / f"global_step{step}"
        place.mkdir(parents=True)
        told = {"step": step, "world_size": 2, "zero_stage": 3} | state
        (place / "mirage_state.json").write_text(json.dumps(told))
        (place / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(bytes(1000))
        write_manifest(place, [entry_of(place, file) for file in place.iterdir()])
        (place.parent / "latest").write_text(place.name)
        places.append(place)
    return places


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mirage-ds", "checkpoint", *map(str, arguments)])
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Checkpoints that DeepSpeed would have converted; it is never reached."""
    noted: list[Path] = []
    monkeypatch.setattr(universal, "_convert", lambda place, *_: noted.append(place))
    return noted


# ------------------------------------------------------------------------------------------------------- the command


def test_nothing_to_convert_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[Path]
) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        assert call(monkeypatch, "convert", source) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == (
            f"error: {source}: has no checkpoints (run/checkpoints/global_step<N>); name a checkpoint or a run's "
            "folder\n"
        )
        assert call(monkeypatch, "list", source) == 2
        assert "has no checkpoints" in capsys.readouterr().err
    assert not asked


def test_newest_whole_one_is_taken_and_damage_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[Path]
) -> None:
    first, second = fake_run(tmp_path, 2, 4)
    shard = second / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(bytes(999) + b"\1")
    damage = f"{shard.name} differs from what was written (SHA-256)"
    assert call(monkeypatch, "convert", tmp_path) == 0
    said = capsys.readouterr()
    assert asked == [first]
    assert said.out.startswith(f"{first / 'universal'}: step 2, written by 2 rank(s), ")
    assert f"{second} is damaged: {damage}" in said.err
    # Named, it is refused.
    assert call(monkeypatch, "convert", second) == 2
    assert capsys.readouterr().err.endswith(f"error: {second} is damaged: {damage}; take an older one\n")
    # Without a manifest or without a state it is no checkpoint that can be trusted.
    (first / "mirage_manifest.json").unlink()
    assert call(monkeypatch, "convert", first) == 2
    assert "mirage_manifest.json is missing or broken" in capsys.readouterr().err
    assert call(monkeypatch, "convert", tmp_path) == 2
    assert "no checkpoint in " in capsys.readouterr().err
    assert asked == [first]


@pytest.mark.parametrize("stage", [0, 4])
def test_other_zero_stages_are_refused(tmp_path: Path, stage: int, asked: list[Path]) -> None:
    (place,) = fake_run(tmp_path, 2, zero_stage=stage)
    with pytest.raises(UserError) as error:
        convert(place, say=lambda _: None)
    assert str(error.value) == f"{place}: ZeRO stage {stage} cannot be converted; checkpoints of stages 1, 2 and 3 can"
    assert not asked


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Path]
) -> None:
    (place,) = fake_run(tmp_path, 2)
    state = (place / "mirage_state.json").stat().st_size
    # A shard of 1000 bytes: twice and once more; three times the state; a twentieth.
    needed = (3000 + 3 * state) * 21 // 20
    before = sorted(place.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        UserError, match=r"a conversion needs .* GB beside it \(about half of that stays\), .* are free"
    ):
        convert(place, say=lambda _: None)
    assert sorted(place.iterdir()) == before
    assert not asked
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    convert(place, say=lambda _: None)
    assert asked == [place]


def test_room_by_hand() -> None:
    # Two ranks of a 7B language model in bf16, ZeRO-3: 7.6e9 elements of 12 bytes.
    shard = 6 * 7_600_000_000
    files = [Entry(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", shard, "") for rank in (0, 1)]
    needed = needed_bytes([*files, Entry("zero_pp_rank_0_mp_rank_00_model_states.pt", 1_000_000, "")])
    assert needed == pytest.approx(1.05 * (2 * 12 * 7.6e9 + 6 * 7.6e9), rel=1e-4)


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Path, files: Any, partial: Path, workers: int) -> None:
        (partial / "half").write_text("…")
        raise OSError(28, "No space left on device", str(partial / "half"))

    (place,) = fake_run(tmp_path, 2)
    before = sorted(place.iterdir())
    monkeypatch.setattr(universal, "_convert", full)
    with pytest.raises(UserError) as error:
        convert(place, say=lambda _: None)
    half = place / ".universal.partial" / "half"
    assert str(error.value) == f"{place}: not converted: {half}: No space left on device"
    assert sorted(place.iterdir()) == before


def test_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[Path]
) -> None:
    first, second = fake_run(tmp_path, 2, 4)
    convert(first, say=lambda _: None)
    (second / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "list", tmp_path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["step", "ranks", "GB", "whole", "universal"]
    assert [lines[2][at] for at in (0, 1, 3, 4)] == ["2", "2", "yes", "yes"]
    assert [lines[3][at] for at in (0, 1, 3, 4)] == ["4", "?", "no:", "zero_pp_rank_0_mp_rank_00_optim_states.pt:"]
    assert lines[3][-1] == "no"


# -------------------------------------------------------------------------------------------- DeepSpeed's own setting


def test_form_decides_and_not_the_json() -> None:
    values: dict[str, Any] = {"checkpoint": {"writer": None}}
    use_universal(values, True)
    assert values == {"checkpoint": {"writer": None, "load_universal": True}}
    use_universal(values, False)
    assert values == {"checkpoint": {"writer": None, "load_universal": False}}
    untouched: dict[str, Any] = {}
    use_universal(untouched, False)
    assert untouched == {}


# ------------------------------------------------------------------------------------------ what training never changes


def test_digest_is_of_dtype_shape_and_bytes() -> None:
    one = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    others = [one.reshape(3, 2), one.to(torch.int32), one + torch.eye(2, 3), one.view(torch.int32), one.t()]
    assert len({digest(tensor) for tensor in [one, *others]}) == 6
    assert digest(one.t().contiguous().t()) == digest(one) == digest(one.clone())
    assert len({digest(torch.zeros(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)}) == 2
    # A flipped last bit, and no elements.
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(1.0).nextafter(torch.tensor(2.0)))
    assert digest(torch.empty(0, 2)) != digest(torch.empty(2, 0))


def test_first_tensor_that_differs_is_named() -> None:
    noted = {"a": "00", "b": "11", "rates": [1.0, 0.1]}
    check_same("step2", noted, dict(noted))
    # The last bits of what each process computes anew may differ.
    check_same("step2", noted, noted | {"rates": [1.0, 0.1 + 1e-8]})
    for changed, what in (
        ({"b": "22"}, "the frozen tensor b is not that of step2"),
        ({"rates": [1.0, 0.10001]}, "rates is not that of step2"),
        ({"rates": [1.0]}, "rates is not that of step2"),
        ({"rates": "00"}, "rates is not that of step2"),
        ({"rates": [1.0, float("nan")]}, "rates is not that of step2"),
        ({"c": "33"}, "c is not in step2"),
    ):
        with pytest.raises(UserError, match=what):
            check_same("step2", noted, noted | changed)
    with pytest.raises(UserError, match="a of step2 is missing here"):
        check_same("step2", noted, {"b": "11", "rates": [1.0, 0.1]})

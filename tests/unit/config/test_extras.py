"""What is not installed is said at the start of a command, before it reads, loads or writes anything."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from support.commands import caller

from mirage_ds.config.extras import EXTRAS, need, need_for
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.tasks.render import _rendered_tiles, load_tiles

REPO = Path(__file__).parents[3]
RUN = {"save_model_path": Path("out"), "stage": "stage1", "model": "m", "data_path": Path("d.jsonl")}
DECODES = {"eval_data_path": Path("e.jsonl"), "eval_every": 1}


def gone(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        packages = {re.split(r"[>=<]", one)[0]: one for one in declared[extra]}
        for name in modules:
            module, _, version = name.partition("==")
            (package,) = [one for one in packages if one.removesuffix("-skinny").replace("-", "_") == module]
            assert not version or packages[package] == name


@pytest.mark.parametrize(
    ("module", "settings", "says"),
    [
        (
            "matplotlib",
            {"eval_pictures": 2, **DECODES},
            '--eval_pictures 2 needs matplotlib, which .*"mirage-ds[plot]"',
        ),
        ("peft", {"lora_rank": 8}, '--lora_rank 8 needs peft, which is not installed: pip install "mirage-ds[lora]"'),
        ("liger_kernel", {"kernels": "liger"}, '--kernels liger needs liger_kernel, which .*"mirage-ds[liger]"'),
        ("wandb", {"report_to": ["wandb"]}, '--report_to wandb needs wandb, which .*"mirage-ds[wandb]"'),
        (
            "mlflow",
            {"report_to": ["none", "mlflow"][1:]},
            '--report_to mlflow needs mlflow, which .*"mirage-ds[mlflow]"',
        ),
    ],
)
def test_settings_of_a_run(monkeypatch: pytest.MonkeyPatch, module: str, settings: dict, says: str) -> None:
    gone(monkeypatch, *{"matplotlib", "peft", "liger_kernel", "wandb", "mlflow", "gymnasium"} - {module})
    need_for(RunConfig(**RUN))
    gone(monkeypatch, module)
    need_for(RunConfig(**RUN))
    with pytest.raises(UserError, match=says.replace("[", r"\[")) as error:
        need_for(RunConfig(**RUN, **settings))
    assert "\n" not in str(error.value)


def test_the_renderers_version_is_part_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    need("vsp", "this")
    monkeypatch.setattr("mirage_ds.config.extras.version", lambda module: "1.4.0")
    how = 'pip install "mirage-ds[vsp]"'
    with pytest.raises(UserError) as error:
        need("vsp", "this")
    assert str(error.value) == f"this needs gymnasium 1.2.3, and 1.4.0 is installed: {how}"
    gone(monkeypatch, "gymnasium")
    _rendered_tiles.cache_clear()
    with pytest.raises(UserError, match="a VSP task, which draws maps, needs gymnasium, which is not installed"):
        _rendered_tiles()


STUDY = """
name: s
out: runs
stages: {one: {stage: stage1, model: base, data_path: rows.jsonl, global_batch_size: 2%s}}
arms: {a: {chain: [one]}}
evaluations: {t: {data_path: rows.jsonl, controls: "own,path"}}
"""


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("matplotlib", "inspect base --data_path gone.jsonl --out seen", "inspect needs matplotlib"),
        ("gymnasium", "controls base --data_path gone.jsonl --latents own,path", "--latents path needs gymnasium"),
        ("pygame", "evaluate base --data_path gone.jsonl --latents path", "--latents path needs pygame"),
        ("gymnasium", "data build vsp-spatial-planning --out boards --exclude gone", "draws maps, needs gymnasium"),
        ("matplotlib", "ablate report gone.yaml", "`ablate report`, which draws, needs matplotlib"),
        ("matplotlib", "ablate plan study.yaml", "`ablate report`, which draws, needs matplotlib"),
        ("matplotlib", "ablate run study.yaml", "`ablate report`, which draws, needs matplotlib"),
        ("gymnasium", "ablate plan study.yaml", "evaluation t: controls: path needs gymnasium"),
        ("peft", "ablate run lora.yaml", "--lora_rank 4 needs peft"),
    ],
)
def test_commands_ask_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, module: str, words: str, says: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"text_input": "?", "text_output": "x", "image_output": "a.png"}\n')
    (tmp_path / "study.yaml").write_text(STUDY % "")
    (tmp_path / "lora.yaml").write_text(STUDY % ", lora_rank: 4")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    gone(monkeypatch, module)
    for kept in (load_tiles, _rendered_tiles):
        kept.cache_clear()
    code, out, error = caller(monkeypatch, capsys)(*words.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(rf'error: .*{re.escape(says)}, which is not installed: pip install "mirage-ds\[\w+\]"\n', error)
    assert sorted(tmp_path.rglob("*")) == before


def test_sheets_of_records_need_no_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    gone(monkeypatch, "matplotlib", "gymnasium", "pygame", "peft", "wandb", "mlflow")
    sample, page = REPO / "data/sample_planning.jsonl", tmp_path / "page.png"
    assert caller(monkeypatch, capsys)("data", "show", sample, "--rows", "1", "--out", page)[0] == 0
    assert page.read_bytes().startswith(b"\x89PNG")

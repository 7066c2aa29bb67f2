"""What is saved opens in transformers 4 where its base did: the same tokens, the same limits of pictures, equal logits.

MIRAGE_PYTHON_4 names the Python of an environment with transformers 4 (4.57 was used) and torch; without it these tests
are skipped, and how the files are spelt is tested by tests/unit/model/test_published.py alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published import LAYOUTS, write_layout

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.engine.save import Parts, change_rows, save_model
from mirage_ds.engine.spelling import read_base
from mirage_ds.model.load import load_model

PYTHON_4 = os.environ.get("MIRAGE_PYTHON_4")
TEXTS = ("Where does the way go? Left.", "system\nYou are a helpful assistant.\nuser\n")
TRAINED = {"stage": "stage1", "latent_size": 6, "slots": None, "compress_strategy": "grid"}
# Prints what plain transformers makes of each folder that is named on its standard input.
READ = """
import json, sys
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
ids = torch.tensor([[151644, 872, 198, 97, 4, 5, 6, 151645, 198, 151650]])
for line in sys.stdin:
    folder = line.strip()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer("<|latent_start|><|latent_pad|> Where, Left? <|im_end|>")["input_ids"]
    turn = tokenizer.chat_template and tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :, ::997].tolist()
    said = dict(text=text, plain=tokenizer.decode(text, skip_special_tokens=True), turn=turn, logits=logits)
    said |= dict(rows=model.get_input_embeddings().num_embeddings, dtype=str(AutoConfig.from_pretrained(folder).dtype))
    try:
        processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        said["grid"] = processor(Image.new("RGB", (100, 61)), return_tensors="pt")["image_grid_thw"].tolist()
    except (OSError, ValueError) as error:
        said["grid"] = type(error).__name__
    print("said", json.dumps([transformers.__version__, folder, said]), flush=True)
"""


def read_by(python: str, folders: list[Path]) -> dict[Path, dict[str, Any]]:
    """Open folders in plain transformers of another environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    asked = "".join(f"{folder}\n" for folder in folders)
    done = subprocess.run(
        [python, "-c", READ], input=asked, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    return {Path(folder): {"version": version, **said} for version, folder, said in lines}


def save(base: Path, processor: Path, out: Path) -> None:
    """Save what training would, every weight a little larger."""
    loaded = load_model(base, stage="stage2", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.0625)
    encoder = load_encoder([str(base), str(processor)], ImageFinder(()), "sft", 1)
    assert loaded.tower
    parts = Parts(read_base(base, encoder.tokenizer), encoder.tokenizer, encoder.images, base, TRAINED)
    save_model(loaded.model, loaded.tower.tower, out, 0, parts)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON_4 is None, reason="MIRAGE_PYTHON_4 names no Python with transformers 4")
def test_every_layout_opens_in_both(tmp_path: Path) -> None:
    folders: list[tuple[Path, ...]] = []
    for layout in LAYOUTS:
        base = write_layout(layout, tmp_path / layout.name / "base", TEXTS)
        save(base, tmp_path / LAYOUTS[0].name / "base", base.with_name("saved"))
        change_rows(base.with_name("saved"), base.with_name("wide"), 152_128, 151_672)
        folders.append(tuple(base.with_name(name) for name in ("base", "saved", "wide")))
    assert PYTHON_4
    old, new = (read_by(python, [one for three in folders for one in three]) for python in (PYTHON_4, sys.executable))
    for base, saved, wide in folders:
        assert old[base]["version"].startswith("4.")
        for folder in (base, saved, wide):
            one, other = old[folder], new[folder]
            logits = [torch.tensor(said.pop("logits")) for said in (one, other)]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
            one.pop("version")
            other.pop("version")
            if folder == base:
                # The slow processor of 4.57 takes `size` for nothing, and up to 4.48 it had other keys.
                one.pop("grid")
                other.pop("grid")
                before = logits[0]
            else:
                assert (logits[0] - before[:, : logits[0].shape[1]]).abs().max() > 1e-3
            assert one == other, folder
        assert old[wide]["rows"] == 152_128
        # What the base says itself, and the latent tokens.
        assert old[saved]["plain"] == " Where, Left? "
        assert old[saved]["turn"] == (old[base]["turn"] or old[saved]["turn"])

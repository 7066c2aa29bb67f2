"""Plain transformers decodes a saved folder with latents: token for token what `mirage-ds evaluate` answers.

N rows, H hidden, k latents a block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import OTHERS, write
from test_generate import sharpen
from transformers import AutoModelForImageTextToText

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.engine.save import Parts, change_rows, save_model
from mirage_ds.engine.spelling import read_base
from mirage_ds.evaluate.decoder import Decoder, answer_records, load_decoder, run_limits, save_decoder
from mirage_ds.files import GENERATE, delete_model

K = 3
ROWS = (0, 1, 2, 3, 6, 11)
TOKENS = 24
TRAINED: dict[str, Any] = dict(stage="stage2", latent_size=K, slots=None, compress_strategy="average")


def saved(nano: Path, mixed: Path, folder: Path, **trained: Any) -> tuple[Decoder, Path]:
    """Save a model that opens latent blocks by itself: its row of the head points where a prompt ends."""
    sharpen(nano, folder / "sharp")
    decoder = load_decoder(folder / "sharp", ImageFinder.beside(mixed, None))
    model, start = decoder.loaded.model, decoder.encoder.id_of("<|latent_start|>")
    seen: list[torch.Tensor] = []
    hook = model.language_model.norm.register_forward_hook(lambda *given: seen.append(given[2].flatten(0, -2)[-1]))
    answer_records(decoder, scan(mixed)[0][:1], run_limits(decoder, 5, 8, "model"))
    hook.remove()
    # And not where later states lie: there are words between the blocks.
    first, rest = seen[0], torch.stack(seen[1:]).mean(0)
    first = first - (first @ rest) / (rest @ rest) * rest
    model.head.weight.data[start] = 2 * first / first.norm() * model.head.weight.norm(dim=1).mean()
    save_decoder(decoder, folder / "model", TRAINED | trained)
    return load_decoder(folder / "model", ImageFinder.beside(mixed, None)), folder / "model"


def inputs_of(decoder: Decoder, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """What a processor of transformers makes of the prompts (it would need torchvision): padded on the left."""
    longest, image = max(len(one.input_ids) for one in samples), decoder.loaded.config.image_token_id
    ids, mask = torch.zeros(2, len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample.input_ids) :] = sample.input_ids
        mask[row, longest - len(sample.input_ids) :] = 1
    pixels, grids = (torch.cat([getattr(one, name) for one in samples]) for name in ("pixel_values", "image_grid_thw"))
    kinds = (ids == image).long()
    return dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, pixel_values=pixels, image_grid_thw=grids)


@pytest.mark.parametrize("name", ["nano", *OTHERS])
def test_a_batch_is_answered_as_by_evaluate(name: str, nano: Path, mixed: Path, tmp_path: Path) -> None:
    base = nano if name == "nano" else write(name, tmp_path / name)
    decoder, folder = saved(base, mixed, tmp_path)
    records = [scan(mixed)[0][row] for row in ROWS]
    wanted = answer_records(decoder, records, run_limits(decoder, TOKENS, 8, "trained"))
    assert any(K in one.runs for one in wanted)
    inputs = inputs_of(decoder, [decoder.encoder.encode_prompt(record, 0) for record in records])
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    settings = dict(do_sample=False, max_new_tokens=TOKENS, repetition_penalty=1.0)
    given: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    text = model.model.language_model
    text.register_forward_pre_hook(lambda _, *all: given.append(all[1]["inputs_embeds"][:, -1]), with_kwargs=True)
    text.register_forward_hook(lambda *all: made.append(all[2][0][:, -1]))
    prompt = inputs.pop("input_ids")
    found = model.generate(prompt, **inputs, **settings)[:, prompt.shape[1] :]
    assert [row[: len(one.ids)].tolist() for row, one in zip(found, wanted, strict=True)] == [one.ids for one in wanted]
    embed, pad = model.get_input_embeddings(), decoder.encoder.id_of("<|latent_pad|>")
    for row, one in enumerate(wanted):
        # The answer hardly depends on it in a model of random weights.
        for step, token in enumerate(one.ids[:-1]):
            fed = made[step][row] if token == pad else embed(torch.tensor(token))
            assert torch.equal(given[step + 1][row], fed)
    # Without the file a slot is a token like another.
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert plain.generate(prompt, **inputs, **settings)[:, prompt.shape[1] :].tolist() != found.tolist()
    for wrong in ({"num_beams": 2}, {"use_cache": False}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(prompt, **inputs, **settings, **wrong)
    assert not model.get_input_embeddings()._forward_hooks
    model.config.mirage["bottleneck"] = True
    with pytest.raises(ValueError, match=r"--bottleneck, which is not known here; `mirage-ds generate`"):
        model.generate(prompt, **inputs, **settings)
    model.config.mirage["slots"] = "pause"
    with pytest.raises(ValueError, match=r"slots 'pause', which are not known here; `mirage-ds generate`"):
        model.generate(prompt, **inputs, **settings)
    model.config.mirage |= {"slots": None, "compress_strategy": "region"}
    with pytest.raises(ValueError, match=r"slots 'region', which are not known here; `mirage-ds generate`"):
        model.generate(prompt, **inputs, **settings)


def test_the_file_goes_with_its_folder(nano: Path, mixed: Path, tmp_path: Path) -> None:
    decoder, folder = saved(nano, mixed, tmp_path)
    rows = len(decoder.loaded.model.head.weight) + 8
    change_rows(folder, tmp_path / "rows", rows, rows - 8)
    assert (tmp_path / "rows" / GENERATE).read_bytes() == (folder / GENERATE).read_bytes()
    delete_model(tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    # What a save that was killed has left goes too.
    (tmp_path / "killed" / GENERATE).parent.mkdir(parents=True)
    delete_model(tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    # A model of text alone in the same folder has none.
    source = decoder.folder
    parts = Parts(
        read_base(source, decoder.encoder.tokenizer), decoder.encoder.tokenizer, decoder.encoder.images, source, TRAINED
    )
    save_model(
        decoder.loaded.model, decoder.tower.tower, folder, 0, parts._replace(trained=TRAINED | dict(stage="sft"))
    )
    assert not (folder / GENERATE).parent.exists()

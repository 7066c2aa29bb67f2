"""Latents that imitate a region of the input image, against plain transformers, one row at a time.

T tokens of a row, H hidden; R rows and C columns of the first image's cells, n of them in the region.
"""

from __future__ import annotations

import json
import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.pictures import noise
from support.records import write_jsonl
from test_arms import folder_trained_with
from test_forward import (  # noqa: F401  # sharp and other are fixtures
    CPU,
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    gradients,
    other,
    sharp,
    untie,
)
from torch.nn import functional

from mirage_ds.api import load
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import collate
from mirage_ds.data.encode import LATENT_END, LATENT_PAD, LATENT_START, Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.pooling import DROPPED
from mirage_ds.data.record import Record, RecordError, make_record
from mirage_ds.data.record_files import scan
from mirage_ds.data.region import cells_of, count_of, groups_of
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, answer_records, load_decoder, need_latents, run_limits
from mirage_ds.model.generate import decode
from mirage_ds.model.load import load_model
from mirage_ds.model.loss import objective
from mirage_ds.model.slots import Limits

# Of sides that no cell divides: each is resized.
SIZES = ((100, 61), (150, 90), (61, 130), (84, 84))
ROWS: list[dict[str, Any]] = [
    {"text_output": "Left <output_image>up.", "image_input": "a0.png", "region": [0, 0, 99.5, 20]},
    # No mark: first; the second image has none of it.
    {"text_output": "Up and up and up.", "image_input": ["a1.png", "a0.png"], "region": [70, 40, 71, 41]},
    {"text_output": "Down <output_image>", "image_input": "a2.png", "region": [0, 0, 61, 130]},
    {"text_output": "Right.", "image_input": "a3.png", "region": [28, 28, 56, 84], "image_output": "a0.png"},
]


@pytest.fixture(scope="session")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with regions of different sizes."""
    folder = tmp_path_factory.mktemp("boxed")
    for number, size in enumerate(SIZES):
        noise(size, 60 + number, number).save(folder / f"a{number}.png")
    rows = [{"text_input": f"Where{' to' * number}?"} | row for number, row in enumerate(ROWS)]
    return write_jsonl(folder / "boxed.jsonl", rows)


def encoder_of(folder: Path, data: Path, stage: str = "stage1") -> Encoder:
    return load_encoder([str(folder)], ImageFinder.beside(data, None), stage, 4, compress="region")


def encoded(encoder: Encoder, data: Path) -> list[Sample]:
    return [encoder.encode(record, row) for row, record in enumerate(scan(data)[0])]


def overlapped(region: list[float], size: tuple[int, int], rows: int, columns: int) -> list[int]:
    """Cells, in raster order, of which some area lies in the region: one by one."""
    left, top, right, bottom = map(Fraction, region)
    (width, height), found = size, []
    for row in range(rows):
        for column in range(columns):
            x, y = Fraction(column * width, columns), Fraction(row * height, rows)
            inside = x < right and left < x + Fraction(width, columns)
            if inside and y < bottom and top < y + Fraction(height, rows):
                found.append(row * columns + column)
    return found


def slow_row(
    plain: Plain, sample: Sample, row: dict[str, Any], head: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, cross-entropies, states before the latents (n, H), their targets (n, H))."""
    grid = sample.image_grid_thw[0].tolist()
    features = plain.features(sample.pixel_values, sample.image_grid_thw)[0].detach()
    first = row["image_input"] if isinstance(row["image_input"], str) else row["image_input"][0]
    cells = overlapped(row["region"], SIZES[int(first[1])], grid[1] // 2, grid[2] // 2)
    target = torch.stack([features[cell] for cell in cells])
    ids = sample.input_ids.tolist()
    start = plain.start
    p = ids.index(start) + 1
    # Nothing but the region's latents stands between the marks.
    assert ids[p : p + len(cells) + 1] == [plain.pad] * len(cells) + [plain.end]
    assert ids.count(start) == 1
    x = plain.embed(sample)
    x = torch.cat([x[:p], target, x[p + len(cells) :]])
    hidden = plain.states(x, sample)
    # Every token of the answer is a label, latents too.
    begin = max(at for at in range(len(ids)) if ids[at : at + len(head)] == head) + len(head)
    logits = plain.model.lm_head(hidden[begin - 1 : -1])
    ce = functional.cross_entropy(logits, sample.input_ids[begin:], reduction="none")
    return hidden, ce, hidden[p - 1 : p - 1 + len(cells)], target


def slow_rows(folder: Path, data: Path, encoder: Encoder, samples: list[Sample]) -> tuple[Plain, list[Any]]:
    plain: Any = Plain(Task(folder, data, "stage1", 4))
    plain.pad, plain.start, plain.end = (encoder.id_of(one) for one in (LATENT_PAD, LATENT_START, LATENT_END))
    head = encoder.tokenizer("<|im_start|>assistant", add_special_tokens=False)["input_ids"]
    return plain, [slow_row(plain, sample, row, head) for sample, row in zip(samples, ROWS, strict=True)]


# ------------------------------------------------------------------------------------------- loss and gradients


def compare(folder: Path, data: Path, latent_loss: str, reduction: str) -> None:
    """Loss, every hidden state and every gradient, packed against row by row."""
    encoder = encoder_of(folder, data)
    samples = encoded(encoder, data)
    plain, rows = slow_rows(folder, data, encoder, samples)
    lengths = [len(target) for _, _, _, target in rows]
    assert lengths == [one.runs[0][1] for one in samples]
    assert len(set(lengths)) == len(rows)
    assert min(lengths) == 1

    def far(before: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if latent_loss == "l2":
            return (before - target).square().mean(-1)
        return 1 - (before * target).sum(-1) / (before.norm(dim=-1) * target.norm(dim=-1))

    ces, fars = [ce for _, ce, _, _ in rows], [far(before, target) for _, _, before, target in rows]
    if reduction == "sample":
        wanted = sum(0.3 * ce.mean() + own.mean() for ce, own in zip(ces, fars, strict=True)) / len(rows)
    else:
        wanted = 0.3 * torch.cat(ces).mean() + torch.cat(fars).mean()
    wanted.backward()
    loaded = load_model(
        folder, stage="stage1", dtype=torch.float32, device=CPU, checkpointing=False, latent_loss=latent_loss,
        reduction=reduction,
    )  # fmt: skip
    loaded.model.how.region = True
    batch = loaded.tower.attach(collate(samples, 1, encoder.dummy(0)))
    with torch.no_grad():
        _, traced = loaded.model.trace(batch)
    hidden = torch.cat([own for own, _, _, _ in rows]).detach()
    torch.testing.assert_close(traced.hidden[: len(hidden)], hidden, rtol=0, atol=1e-5)
    loss, _, _ = objective(loaded.model(batch), counts_of(samples), 0.3, reduction)
    loss.backward()
    assert abs(loss - wanted) <= 1e-5 * max(1.0, float(wanted.detach()))
    assert_same_gradients(gradients(loaded.model), plain.gradients())


@pytest.mark.parametrize(("latent_loss", "reduction"), [("l2", "sample"), ("cosine", "sample"), ("l2", "token")])
def test_packed_rows_equal_teacher_forced_full_passes(
    sharp: Path,  # noqa: F811
    boxed: Path,
    latent_loss: str,
    reduction: str,
) -> None:
    compare(sharp, boxed, latent_loss, reduction)


@pytest.mark.parametrize("other", ["nano-qwen3-vl"], indirect=True)
def test_of_deepstack_features_the_first_numbers_are_imitated(other: Path, boxed: Path) -> None:  # noqa: F811
    compare(other, boxed, "l2", "sample")


@pytest.mark.parametrize("train_targets", [False, True])
def test_a_trained_tower_is_not_pulled_to_the_latents(sharp: Path, boxed: Path, train_targets: bool) -> None:  # noqa: F811
    """The tower's gradient comes through the image, and with --train_targets through the latents' inputs too."""
    encoder = encoder_of(sharp, boxed)
    samples = encoded(encoder, boxed)[2:]
    plain = Plain(Task(sharp, boxed, "stage1", 4), train_vision=True)
    slow = []
    for sample, row in zip(samples, ROWS[2:], strict=True):
        grid = sample.image_grid_thw[0].tolist()
        features = plain.features(sample.pixel_values, sample.image_grid_thw)[0]
        size = SIZES[int(row["image_input"][1])]
        target = features[overlapped(row["region"], size, grid[1] // 2, grid[2] // 2)]
        (p, n), x = sample.runs[0], plain.embed(sample)
        x = torch.cat([x[:p], target if train_targets else target.detach(), x[p + n :]])
        hidden = plain.states(x, sample)
        slow.append(plain.ce(hidden, sample).mean() + (hidden[p - 1 : p - 1 + n] - target.detach()).square().mean())
    (sum(slow) / 2).backward()
    loaded = load_model(
        sharp, stage="stage1", dtype=torch.float32, device=CPU, checkpointing=False, latent_loss="l2",
        train_vision=True, train_targets=train_targets,
    )  # fmt: skip
    loaded.model.how.region = True
    loss, _, _ = objective(loaded.model(collate(samples, 1, encoder.dummy(0))), counts_of(samples), 1.0, "sample")
    loss.backward()
    assert_same_gradients(gradients(loaded.model), plain.gradients())
    assert any(name.startswith("visual.") for name in gradients(loaded.model))


def test_counts_of_a_row_are_those_of_its_sample(sharp: Path, boxed: Path) -> None:  # noqa: F811
    encoder = encoder_of(sharp, boxed)
    for row, record in enumerate(scan(boxed)[0]):
        measure, sample = encoder.measure(record), encoder.encode(record, row)
        assert (measure.tokens, measure.runs) == (len(sample.input_ids), 1)
        assert measure.latents == sample.runs[0][1] == int((sample.input_ids == encoder.id_of(LATENT_PAD)).sum())
        assert measure.labels == int((sample.labels != IGNORE).sum())
        assert measure.helpers == ()
    # In any other stage a region is no place for latents.
    for stage in ("sft", "stage2"):
        plain = load_encoder([str(sharp)], ImageFinder.beside(boxed, None), stage, 4)
        assert [plain.measure(one).latents for one in scan(boxed)[0][:2]] == [0 if stage == "sft" else 4, 0]


# ------------------------------------------------------------------------------------------------------ cells


def record_of(**more: Any) -> Record:
    return make_record({"text_input": "?", "text_output": "!", "image_input": "a.png"} | more, 7)


def test_cells_are_those_that_share_area_with_the_region() -> None:
    draw = random.Random(3)
    for _ in range(300):
        width, height, rows, columns = (draw.randint(*of) for of in ((2, 90), (2, 90), (1, 7), (1, 7)))
        step = draw.choice([1, 2, 4])
        across = sorted(draw.sample(range(width * step + 1), 2))
        down = sorted(draw.sample(range(height * step + 1), 2))
        region = [across[0] / step, down[0] / step, across[1] / step, down[1] / step]
        if region[2] <= 1 and region[3] <= 1:
            continue
        cells = cells_of(record_of(region=region), [(height, width)], [(rows, columns)])
        slow = overlapped(region, (width, height), rows, columns)
        groups = groups_of(cells, columns, rows * columns + 3)
        assert [int(cell) for cell in (groups != DROPPED).nonzero()[0]] == slow
        assert groups[slow].tolist() == list(range(len(slow)))
        assert count_of(cells) == len(slow) >= 1


def test_a_region_that_ends_where_a_cell_does_takes_no_further_one() -> None:
    for side in range(1, 60):
        for columns in range(2, 9):
            sizes, sides = [(90, side * columns)], [(1, columns)]
            for left in range(columns - 1):
                region = [left * side, 0, (left + 1) * side, 90]
                assert cells_of(record_of(region=region), sizes, sides) == (left, 0, left + 1, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, r"line 7, region: missing, and .*; write \[left, top, right, bottom\] in pixels .*--columns region="),
        ({"region": [1, 2, 3]}, r"region: expected four numbers, found \[1, 2, 3\]"),
        ({"region": [1, 2, 3, True]}, "region: expected four numbers"),
        ({"region": "there"}, "region: expected four numbers, found 'there'"),
        ({"region": {"left": 1}}, "region: expected four numbers"),
        ({"region": [5, 2, 5, 9]}, r"region: \[5, 2, 5, 9\] is no box in an image of 40×30 pixels"),
        ({"region": [0, 0, 41, 30]}, "is no box in an image of 40×30"),
        ({"region": [-1, 0, 4, 3]}, "is no box in an image of 40×30"),
        ({"region": [0, 0, 40, 30.5]}, "is no box in an image of 40×30"),
        ({"region": [0.1, 0.2, 0.9, 1]}, "is within one pixel, as shares of the image would be"),
        (
            {"region": [0, 0, 9, 9], "text_output": "a <output_image> b <output_image>"},
            "text_output: several <output_image> marks, and a row has one region",
        ),
        ({"region": [0, 0, 9, 9], "image_input": []}, "image_input: no image that a region could be of"),
    ],
)
def test_a_faulty_region_is_said_with_its_line(row: dict[str, Any], said: str) -> None:
    record = record_of(**row)
    with pytest.raises(RecordError, match=said):
        cells_of(record, [(30, 40)] * len(record.image_input), [(2, 3)] * len(record.image_input))


def test_a_region_may_be_a_text_in_a_table() -> None:
    assert cells_of(record_of(region="[0, 0, 40, 1.5]"), [(30, 40)], [(2, 3)]) == (0, 0, 3, 1)


# --------------------------------------------------------------------------------------------------- decoding


def region_folder(folder: Path, out: Path, longest: int) -> Path:
    shutil.copytree(folder, out / "base")
    untie(out / "base")
    given = {"stage": "stage1", "slots": None, "latent_size": longest, "compress_strategy": "region"}
    return folder_trained_with(out / "base", out / "model", **given)


def slow_answer(decoder: Decoder, plain: Plain, sample: Sample, plan: dict[int, int], longest: int) -> list[int]:
    """Token by token, each from a whole pass: a block ends where the model says so, or after `longest` latents."""
    pad, start, end = (decoder.encoder.id_of(token) for token in (LATENT_PAD, LATENT_START, LATENT_END))
    stops = {decoder.encoder.id_of(token) for token in ("<|im_end|>", "<|endoftext|>")}
    x, positions, ids, latents = plain.embed(sample), sample.position_ids, [], None
    for step in range(14):
        hidden = plain.model.model.language_model(
            inputs_embeds=x[None], position_ids=positions[:, None], use_cache=False
        ).last_hidden_state[0, -1]
        token = plan.get(step, int(plain.model.lm_head(hidden).argmax()))
        fed = plain.model.get_input_embeddings()(torch.tensor(token))
        if latents is None:
            latents = 0 if token == start else None
        elif token == end or latents == longest:
            token, latents, fed = end, None, plain.model.get_input_embeddings()(torch.tensor(end))
        else:
            token, latents, fed = pad, latents + 1, hidden
        ids.append(token)
        if token in stops:
            break
        x = torch.cat([x, fed[None]])
        positions = torch.cat([positions, (positions.max() + 1).expand(3, 1)], dim=1)
    return ids


@torch.no_grad()
def test_a_block_ends_where_the_model_says_or_after_the_longest_region(
    sharp: Path,  # noqa: F811
    boxed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = 5
    decoder = load_decoder(region_folder(sharp, tmp_path, longest), ImageFinder.beside(boxed, None))
    limits = run_limits(decoder, 14, 8, "trained")
    assert limits == Limits(14, longest, None)
    assert run_limits(decoder, 14, 8, "model") == Limits(14, 8, None)
    assert run_limits(decoder, 14, 8, "3") == Limits(14, 8, 3)
    start, end = (decoder.encoder.id_of(token) for token in (LATENT_START, LATENT_END))
    # A random model opens no block by itself: what it says at some steps is given, everything else is its own.
    plans = [{0: start, 3: end}, {0: start}, {1: start, 2: end, 4: start, 6: end}, {}]

    def planned(model, prompts, tokens, limits, choose, **options):
        def first(logits: torch.Tensor, turns) -> torch.Tensor:
            own = choose(logits, turns).tolist()
            return torch.tensor(
                [
                    plans[prompts.rows[turn.row]].get(turn.step, one)
                    for turn, one in zip(turns, own, strict=True)
                ]
            )  # fmt: skip

        return decode(model, prompts, tokens, limits, first, **options)

    monkeypatch.setattr("mirage_ds.evaluate.decoder.decode", planned)
    records = scan(boxed)[0]
    answers = answer_records(decoder, records, limits)
    plain = Plain(Task(decoder.folder, boxed, "sft", 4))
    prompts = [decoder.encoder.encode_prompt(record, 0) for record in records]
    wanted = [slow_answer(decoder, plain, prompt, plan, longest) for prompt, plan in zip(prompts, plans, strict=True)]
    assert [answer.ids for answer in answers] == wanted
    assert [answer.runs[:2] for answer in answers][:3] == [[2], [5], [0, 1]]
    # Its prompt has no need of a region.
    assert answer_records(decoder, [make_record({"text_input": "?", "image_input": "a0.png"}, 1, False)], limits)


def test_controls_that_need_a_helper_are_refused(sharp: Path, boxed: Path, tmp_path: Path) -> None:  # noqa: F811
    decoder = load_decoder(region_folder(sharp, tmp_path, 5), ImageFinder.beside(boxed, None))
    need_latents(decoder)
    with pytest.raises(UserError, match="--compress_strategy region: its blocks differ in length and have no helper"):
        need_latents(decoder, regions=False)


def test_the_library_has_the_same_loss(sharp: Path, boxed: Path) -> None:  # noqa: F811
    encoder = encoder_of(sharp, boxed)
    samples = encoded(encoder, boxed)
    _, rows = slow_rows(sharp, boxed, encoder, samples)
    far = [1 - functional.cosine_similarity(before, target, dim=-1) for _, _, before, target in rows]
    wanted = sum(0.1 * ce.mean() + own.mean() for (_, ce, _, _), own in zip(rows, far, strict=True)) / len(rows)
    model = load(sharp)
    found = model.loss(model.batch([*model.rows(boxed, "stage1", compress_strategy="region")]))
    assert abs(found.loss - wanted) <= 1e-5
    # What comes next is no region.
    assert model.loss(model.batch([*model.rows(boxed, "sft")])).sim == 0
    assert not model.model.how.region


# --------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stage": "stage2"}, "--stage stage2: not with --compress_strategy region; leave out one of them"),
        ({"stage": "rl"}, "--stage rl: not with"),
        ({"stage": "sft"}, "--stage sft: not with"),
        ({"stage": "scaffold"}, "--stage scaffold: not with"),
        ({"stage": "stage1", "feed": "own"}, "--feed own: not with"),
        ({"stage": "stage1", "slots": "auxiliary"}, "--slots auxiliary: not with"),
        ({"stage": "stage1", "latent_targets": Path("t")}, "--latent_targets has its own; leave out one"),
        (
            {"stage": "stage1", "eval_pictures": 2, "eval_every": 1, "eval_data_path": Path("e")},
            "--eval_pictures 2: not with",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    fixed = {"model": "m", "save_model_path": tmp_path, "data_path": tmp_path, "compress_strategy": "region"}
    with pytest.raises(ValidationError, match=said):
        RunConfig(**fixed, **given)


def test_no_helper_is_kept(tmp_path: Path) -> None:
    fixed = {"model": "m", "save_model_path": tmp_path, "data_path": tmp_path, "stage": "stage1"}
    assert RunConfig(**fixed, compress_strategy="region").kept_fields == ("image_input",)
    assert RunConfig(**fixed, compress_strategy="region", feature_cache="targets").kept_fields == ()
    assert RunConfig(**fixed).kept_fields == ("image_input", "image_output")


@pytest.mark.parametrize("more", [{}, {"messages": []}])
def test_its_column_may_have_another_name(more: dict[str, Any]) -> None:
    from mirage_ds.config.columns import parse_columns

    columns = parse_columns("question=q,answer=a,image=i,region=bbox")
    row = {"q": "?", "a": "!", "i": "a.png", "bbox": [1, 2, 3, 4]} | more
    assert make_record(row, 1, columns=columns).extra["region"] == [1, 2, 3, 4]
    own = {"text_input": "?", "text_output": "!", "image_input": "a.png", "bbox": [1, 2, 3, 4]}
    assert make_record(json.dumps(own), 1, columns=parse_columns("region=bbox")).extra["region"] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="region is one column, and 2 are named"):
        parse_columns("region=a,region=b")

"""The arms of a study that change what stands at the slots, against plain transformers, one row at a time.

T tokens of a row, H hidden, k latents a run, p first latent of a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_forward import (  # noqa: F401  # sharp and doubled are fixtures
    CPU,
    HELPED,
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    doubled,
    gradients,
    sharp,
    untie,
)
from torch.nn import functional

from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import LATENT_END, LATENT_PAD, LATENT_START, Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.pooling import DROPPED, grid_sides, pool_groups
from mirage_ds.data.record import RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, answer_records, load_decoder, need_latents, run_limits
from mirage_ds.model.generate import decode
from mirage_ds.model.load import load_model
from mirage_ds.model.loss import objective
from mirage_ds.model.slots import Limits

K = 3


def arm(folder: Path, data: Path, stage: str, **options: object) -> Encoder:
    return load_encoder([str(folder)], ImageFinder.beside(data, None), stage, K, **options)


def encoded(encoder: Encoder, data: Path, rows: tuple[int, ...]) -> list[Sample]:
    records, _ = scan(data)
    return [encoder.encode(records[row], row) for row in rows]


def loss_of(loaded, batch: Batch, samples: list[Sample], gamma: float) -> torch.Tensor:
    if loaded.tower is not None:
        batch = loaded.tower.attach(batch)
    loss, _, _ = objective(loaded.model(batch), counts_of(samples), gamma, "sample")
    return loss


# ------------------------------------------------------------------------------------------------------------ pooling


def test_average_is_equal_contiguous_groups_without_the_rest() -> None:
    for rows, columns, k in ((3, 3, 3), (2, 5, 3), (1, 11, 3), (2, 2, 4), (7, 1, 1), (5, 1, 4)):
        size = rows * columns // k
        slow = [i // size if i < k * size else DROPPED for i in range(rows * columns)]
        assert pool_groups(rows, columns, k, "average").tolist() == slow


def test_grid_cuts_the_picture_into_blocks() -> None:
    assert pool_groups(4, 6, 4, "grid").reshape(4, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    # 5 rows in two bands: none is dropped, one band is larger.
    assert pool_groups(5, 4, 2, "grid").reshape(5, 4).tolist() == [[0] * 4] * 3 + [[1] * 4] * 2
    assert pool_groups(2, 6, 3, "grid").reshape(2, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert grid_sides(6, 6, 8) == (4, 2)
    assert grid_sides(3, 3, 7) is None
    with pytest.raises(ValueError, match="cannot be cut into 7"):
        pool_groups(3, 3, 7, "grid")


@pytest.mark.parametrize("compress", ["average", "grid", "random", "first"])
def test_every_slot_gets_its_share(compress: str) -> None:
    for rows, columns, k in ((6, 6, 4), (5, 3, 2), (4, 4, 1), (8, 7, 6)):
        groups = pool_groups(rows, columns, k, compress)
        sizes = np.bincount(groups[groups != DROPPED], minlength=k)
        assert len(groups) == rows * columns
        if compress == "first":
            assert groups.tolist() == [*range(k), *[DROPPED] * (rows * columns - k)]
        elif compress == "grid":
            assert sizes.sum() == rows * columns
            assert sizes.min() > 0
        else:
            assert sizes.tolist() == [rows * columns // k] * k


def test_random_is_the_same_in_every_helper_of_one_size_and_no_band() -> None:
    one, other = pool_groups(6, 6, 4, "random"), pool_groups(6, 6, 4, "random")
    assert one.tolist() == other.tolist() == pool_groups(9, 4, 4, "random").tolist()
    assert one.tolist() != sorted(one.tolist())
    # Spread over the picture: a band of nine reaches over nine places.
    assert all(np.ptp(np.flatnonzero(one == group)) > 18 for group in range(4))


@pytest.mark.parametrize("compress", ["average", "grid", "random", "first"])
def test_stage1_takes_the_targets_of_its_groups(sharp: Path, doubled: Path, compress: str) -> None:  # noqa: F811
    encoder = arm(sharp, doubled, "stage1", compress=compress)
    samples = encoded(encoder, doubled, (0, 1, 2))
    plain, loaded = (
        Plain(Task(sharp, doubled, "stage1", K)),
        load_model(sharp, stage="stage1", dtype=torch.float32, device=CPU, checkpointing=False),
    )
    with torch.no_grad():
        _, traced = loaded.model.trace(loaded.tower.attach(collate(samples, 1, encoder.dummy(0))))
        at = 0
        for sample in samples:
            features = plain.features(sample.helper_pixel_values, sample.helper_grid_thw)
            for own, grid, (p, k) in zip(features, sample.helper_grid_thw.tolist(), sample.runs, strict=True):
                groups = pool_groups(grid[1] // 2, grid[2] // 2, k, compress)
                for slot in range(k):
                    slow = own[torch.from_numpy(groups == slot)].double().mean(0)
                    torch.testing.assert_close(traced.inputs[at + p + slot].double(), slow, rtol=0, atol=2e-6)
            at += len(sample.input_ids)


def test_a_helper_that_no_grid_cuts_is_said_with_its_line(sharp: Path, mixed: Path) -> None:  # noqa: F811
    encoder = replace(arm(sharp, mixed, "stage1", compress="grid"), latent_size=5)
    record = scan(mixed)[0][0]
    with pytest.raises(RecordError, match=r"line 1, .*merged tokens, which cannot be cut into 5 blocks"):
        encoder.encode(record, 0)


# ---------------------------------------------------------------------------------------------------------- auxiliary


def without_latents(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask of the tokens that are no latents, and their positions in a row that has none: text goes on without gap."""
    latent = torch.zeros(len(sample.input_ids), dtype=torch.bool)
    for p, k in sample.runs:
        latent[p : p + k] = True
    return ~latent, latent


def auxiliary_row(plain: Plain, sample: Sample, ordinary: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropies, 1 − cosines): the answer in a row without latents, each run behind the text before it alone."""
    text = plain.model.model.language_model
    x = plain.embed(ordinary)
    kept, _ = without_latents(ordinary)
    # As if the latents had never been written: positions of the ordinary row, moved up.
    gone = torch.cumsum(~kept, 0)
    positions = ordinary.position_ids - gone
    answer = text(
        inputs_embeds=x[kept][None], position_ids=positions[:, None, kept], use_cache=False
    ).last_hidden_state[0]
    hidden = torch.zeros(len(x), x.shape[1]).index_copy(0, kept.nonzero()[:, 0], answer)
    far = []
    for target, (p, k) in zip(plain.targets(ordinary), ordinary.runs, strict=True):
        before = kept.clone()
        before[p:] = False
        row = torch.cat([x[before], target])
        start = positions[:, before][:, -1:]
        places = torch.cat([positions[:, before], start + 1 + torch.arange(k)], dim=1)
        states = text(inputs_embeds=row[None], position_ids=places[:, None], use_cache=False).last_hidden_state[0]
        hidden = hidden.index_copy(0, torch.arange(p, p + k), states[-k:])
        far += [1 - functional.cosine_similarity(states[-k - 1 + j], target[j], dim=0) for j in range(k)]
    return plain.ce(hidden, ordinary), torch.stack(far) if far else hidden.new_zeros(0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_latents_are_learnt_beside_an_answer_that_does_not_see_them(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    checkpointing: bool,
) -> None:
    rows = (0, 1, 2, 3)
    encoder = arm(sharp, doubled, "stage1", slots="auxiliary")
    ordinary = [Task(sharp, doubled, "stage1", K).samples([row])[0] if row < 3 else None for row in rows]
    records, _ = scan(doubled)
    samples = [encoder.encode(records[row], row) for row in rows[:3]]
    plain = Plain(Task(sharp, doubled, "stage1", K))
    found = [auxiliary_row(plain, sample, other) for sample, other in zip(samples, ordinary[:3], strict=True)]
    wanted = sum(0.1 * ce.mean() + far.mean() for ce, far in found) / 3
    wanted.backward()
    loaded = load_model(sharp, stage="stage1", dtype=torch.float32, device=CPU, checkpointing=checkpointing)
    loss = loss_of(loaded, collate(samples, 2, encoder.dummy(1), auxiliary=True), samples, 0.1)
    loss.backward()
    assert abs(loss - wanted) <= 1e-5
    assert_same_gradients(gradients(loaded.model), plain.gradients())


def test_an_auxiliary_micro_batch_without_latents_gets_the_dummy(sharp: Path, mixed: Path) -> None:  # noqa: F811
    encoder = arm(sharp, mixed, "stage1", slots="auxiliary")
    batch = collate([], 2, encoder.dummy(1), auxiliary=True)
    assert batch.weight.tolist() == [0.0]
    assert [len(one.tokens) for one in batch.passes] == [2, K]
    loaded = load_model(sharp, stage="stage1", dtype=torch.float32, device=CPU, checkpointing=False)
    sums = loaded.model(loaded.tower.attach(batch))
    assert sums.ce == sums.sim == 0


def test_auxiliary_answers_depend_on_no_target(sharp: Path, doubled: Path) -> None:  # noqa: F811
    """Another helper changes the latents' loss and not one cross-entropy."""
    encoder = arm(sharp, doubled, "stage1", slots="auxiliary")
    samples = encoded(encoder, doubled, (0, 1))
    changed = [one._replace(helper_pixel_values=one.helper_pixel_values.flip(0)) for one in samples]
    loaded = load_model(sharp, stage="stage1", dtype=torch.float32, device=CPU, checkpointing=False)
    with torch.no_grad():
        one, other = (
            loaded.model.trace(loaded.tower.attach(collate(rows, 2, encoder.dummy(1), auxiliary=True)))[1]
            for rows in (samples, changed)
        )
    # The last latent of a run predicts the end mark, which decoding forces: its label alone may depend on a target.
    ends = collate(samples, 2, encoder.dummy(1), auxiliary=True).targets == encoder.id_of(LATENT_END)
    assert torch.equal(one.ce[~ends], other.ce[~ends])
    assert (one.one_minus_cosine - other.one_minus_cosine).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------ pause and marks


def test_pause_and_marks_are_text_of_the_sft_row(sharp: Path, doubled: Path) -> None:  # noqa: F811
    records, _ = scan(doubled)
    latents = arm(sharp, doubled, "stage2")
    pad, start, end = (latents.id_of(token) for token in (LATENT_PAD, LATENT_START, LATENT_END))
    for row, record in enumerate(records):
        full = latents.encode(record, row)
        pause = arm(sharp, doubled, "sft", slots="pause").encode(record, row)
        marks = arm(sharp, doubled, "sft", slots="marks").encode(record, row)
        assert pause.input_ids.tolist() == full.input_ids.tolist()
        assert pause.labels.tolist() == full.labels.tolist()
        assert torch.equal(pause.position_ids, full.position_ids)
        assert marks.input_ids.tolist() == [one for one in full.input_ids.tolist() if one != pad]
        assert marks.labels.tolist() == [
            label for one, label in zip(full.input_ids.tolist(), full.labels.tolist(), strict=True) if one != pad
        ]
        assert pause.runs == marks.runs == ()
        assert marks.input_ids.tolist().count(start) == marks.input_ids.tolist().count(end) == len(full.runs)
        encoder = arm(sharp, doubled, "sft", slots="pause")
        assert encoder.measure(record).runs == 0
        assert encoder.measure(record).labels == int((pause.labels != IGNORE).sum())


def test_pause_trains_as_a_full_pass_over_its_tokens(sharp: Path, doubled: Path) -> None:  # noqa: F811
    encoder = arm(sharp, doubled, "sft", slots="pause")
    samples = encoded(encoder, doubled, (0, 1, 2, 3))
    plain = Plain(Task(sharp, doubled, "sft", K))
    wanted, _ = plain.loss(samples, "sample")
    loaded = load_model(sharp, stage="sft", dtype=torch.float32, device=CPU, checkpointing=False)
    loss = loss_of(loaded, collate(samples, 1, encoder.dummy(0)), samples, 1.0)
    assert abs(loss - wanted) <= 1e-5


def folder_trained_with(folder: Path, out: Path, **trained: object) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"mirage": {"latent_size": K, **trained}}
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config))
    return out


def greedy_by_plain(decoder: Decoder, plain: Plain, sample: Sample, slots: int, steps: int) -> list[int]:
    """Emit tokens one by one, each from a whole pass; runs are `slots` pads as ordinary tokens, then the end mark."""
    pad, start, end = (decoder.encoder.id_of(token) for token in (LATENT_PAD, LATENT_START, LATENT_END))
    stops = {decoder.encoder.id_of(token) for token in ("<|im_end|>", "<|endoftext|>")}
    ids, left = [], -1
    prompt = plain.embed(sample)
    last = int(sample.position_ids.max())
    text = plain.model.model.language_model
    for _ in range(steps):
        x = torch.cat([prompt, plain.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))])
        more = last + 1 + torch.arange(len(ids))
        places = torch.cat([sample.position_ids, more.expand(3, -1)], dim=1)
        hidden = text(inputs_embeds=x[None], position_ids=places[:, None], use_cache=False).last_hidden_state[0, -1]
        logits = plain.model.lm_head(hidden)
        logits[start] = float("-inf")
        token = int(logits.argmax()) if ids else start
        if left >= 0:
            token, left = (pad, left - 1) if left else (end, -1)
        elif token == start:
            left = slots
        ids.append(token)
        if token in stops:
            break
    return ids


@pytest.mark.parametrize(
    ("slots", "stage", "fed"), [("pause", "sft", K), ("marks", "sft", 0), ("auxiliary", "stage1", 0)]
)
@torch.no_grad()
def test_decoding_gives_the_answer_what_training_gave_it(
    sharp: Path,  # noqa: F811
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slots: str,
    stage: str,
    fed: int,
) -> None:
    # An output matrix of its own: what is fed at the slots can then change without what is emitted.
    shutil.copytree(sharp, tmp_path / "base")
    untie(tmp_path / "base")
    folder = folder_trained_with(tmp_path / "base", tmp_path / "model", stage=stage, slots=slots)
    decoder = load_decoder(folder, ImageFinder.beside(mixed, None))
    limits = run_limits(decoder, 12, 8, "trained")
    assert limits == Limits(12, 8, fed)
    plain = Plain(Task(folder, mixed, "sft", K))
    # Random models never open a run by themselves: every answer begins with one, and opens no other.
    start, pad = decoder.encoder.id_of(LATENT_START), decoder.encoder.id_of(LATENT_PAD)
    records = [scan(mixed)[0][row] for row in (0, 1, 5)]

    def opened(model, prompts, tokens, limits, choose, **options):
        def first(logits: torch.Tensor, turns) -> torch.Tensor:
            barred = logits.index_fill(-1, torch.tensor([start]), float("-inf"))
            begins = torch.tensor([turn.step == 0 for turn in turns])
            return torch.where(begins, start, choose(barred, turns))

        return decode(model, prompts, tokens, limits, first, **options)

    monkeypatch.setattr("mirage_ds.evaluate.decoder.decode", opened)
    # And let what is fed at the slots matter: a pad that is far from every hidden state.
    loud = 30 * torch.randn(decoder.loaded.tower.width, generator=torch.Generator().manual_seed(2))
    for weight in (plain.model.get_input_embeddings().weight, decoder.loaded.model.language_model.embed_tokens.weight):
        weight[pad] = loud
    # Hidden states of a random model are almost one direction: a head that does not see it tells them apart.
    prompts = [decoder.encoder.encode_prompt(record, 0) for record in records]
    common = functional.normalize(
        torch.stack([plain.states(plain.embed(one), one)[-1] for one in prompts]).mean(0), dim=0
    )
    matrix = torch.randn(plain.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    matrix -= (matrix @ common)[:, None] * common
    for head in (plain.model.lm_head, decoder.loaded.model.head):
        head.weight.copy_(matrix)
    answers = answer_records(decoder, records, limits)
    wanted = [greedy_by_plain(decoder, plain, prompt, fed, 12) for prompt in prompts]
    assert [answer.ids for answer in answers] == wanted
    assert len({tuple(ids[fed + 2 :]) for ids in wanted}) > 1
    with pytest.raises(UserError, match=f"--slots {slots}: its answers see no latents"):
        need_latents(decoder)


# ------------------------------------------------------------------------------------------- losses and their gradients


def test_l2_is_the_mean_squared_distance(sharp: Path, doubled: Path) -> None:  # noqa: F811
    task = Task(sharp, doubled, "stage1", K)
    samples, plain = task.samples((0, 1, 2)), Plain(task)
    slow = []
    for sample in samples:
        hidden, ce, _ = plain.row(sample)
        far = [
            (hidden[p - 1 + slot] - target[slot]).square().mean()
            for target, (p, k) in zip(plain.targets(sample), sample.runs, strict=True)
            for slot in range(k)
        ]
        slow.append(0.1 * ce.mean() + torch.stack(far).mean())
    wanted = sum(slow) / 3
    wanted.backward()
    loaded = task.load(latent_loss="l2")
    loss = loss_of(loaded, task.pack(samples), samples, 0.1)
    loss.backward()
    assert abs(loss - wanted) <= 1e-5 * max(1.0, float(wanted))
    assert_same_gradients(gradients(loaded.model), plain.gradients())


def test_detached_latents_pass_no_gradient_through_what_is_fed_back(sharp: Path, mixed: Path) -> None:  # noqa: F811
    task = Task(sharp, mixed, "stage2", K)
    samples, plain = task.samples((0, 1, 2)), Plain(task)
    slow = []
    for sample in samples:
        x = plain.embed(sample)
        for p, k in sample.runs:
            for at in range(p, p + k):
                x = torch.cat([x[:at], plain.states(x[:at], sample)[-1:].detach(), x[at + 1 :]])
        slow.append(plain.ce(plain.states(x, sample), sample).mean())
    (sum(slow) / 3).backward()
    loaded, attached = task.load(detach_latents=True), task.load()
    for one in (loaded, attached):
        loss_of(one, task.pack(samples), samples, 1.0).backward()
    assert_same_gradients(gradients(loaded.model), plain.gradients())
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(attached.model), plain.gradients())


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_targets_train_the_tower_by_the_answers_loss_alone(sharp: Path, mixed: Path, gamma: float) -> None:  # noqa: F811
    task = Task(sharp, mixed, "stage1", K)
    samples, plain = task.samples(HELPED), Plain(task, train_vision=True)
    slow = []
    for sample in samples:
        features = plain.features(sample.helper_pixel_values, sample.helper_grid_thw)
        x, far = plain.embed(sample), []
        for own, (p, k) in zip(features, sample.runs, strict=True):
            size = len(own) // k
            target = torch.stack([own[j * size : (j + 1) * size].mean(0) for j in range(k)])
            x = torch.cat([x[:p], target, x[p + k :]])
        hidden = plain.states(x, sample)
        for p, k in sample.runs:
            far += [1 - functional.cosine_similarity(hidden[p - 1 + j], x[p + j].detach(), dim=0) for j in range(k)]
        slow.append(gamma * plain.ce(hidden, sample).mean() + torch.stack(far).mean())
    (sum(slow) / len(slow)).backward()
    loaded = task.load(train_vision=True, train_targets=True)
    loss_of(loaded, task.pack(samples), samples, gamma).backward()
    got, wanted = gradients(loaded.model), plain.gradients()
    got, wanted = ({name: one for name, one in part.items() if one.norm() > 0} for part in (got, wanted))
    assert_same_gradients(got, wanted)
    assert any(name.startswith("visual.") for name in got)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"stage": "sft", "slots": "latents"},
            "--slots latents: --stage sft takes pause, marks",
        ),
        ({"stage": "stage2", "slots": "auxiliary"}, "--slots auxiliary: --stage stage2 takes"),
        ({"stage": "stage1", "slots": "pause"}, "--slots pause: --stage stage1 takes"),
        ({"stage": "stage1", "detach_latents": True}, "--detach_latents is for --stage stage2"),
        ({"stage": "stage1", "train_targets": True}, "--train_targets trains the tower of stage1: add --train_vision"),
    ],
)
def test_settings_that_do_not_fit_the_stage_are_refused(given: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        RunConfig(model="m", save_model_path=tmp_path, data_path=tmp_path, **given)


def test_passes_of_a_run(tmp_path: Path) -> None:
    make: Callable[..., RunConfig] = lambda **given: RunConfig(  # noqa: E731
        model="m", save_model_path=tmp_path, data_path=tmp_path, latent_size=4, **given
    )
    assert [make(stage=stage).passes(2) for stage in ("sft", "stage1", "stage2")] == [1, 1, 9]
    assert make(stage="stage1", slots="auxiliary").passes(2) == 2
    assert make(stage="sft", slots="pause").passes(0) == 1

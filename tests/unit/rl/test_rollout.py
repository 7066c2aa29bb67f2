"""Sampled answers as rows to learn from, and the decoder's log-probabilities beside those of the packed forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mirage_ds.config.rl import LatentPolicy
from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import IGNORE
from mirage_ds.errors import Stopped
from mirage_ds.model.choose import Turn, greedy
from mirage_ds.model.forward import Scoring
from mirage_ds.model.load import load_model
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import LatentTokens, Limits, latent_tokens
from mirage_ds.rl import rollout
from mirage_ds.rl.rollout import RECORDED, Recorder, Sampled, row_of, sampled

CPU, K = torch.device("cpu"), 2
PAD, START, END, STOP = 1, 2, 3, 9
TOKENS = LatentTokens(PAD, START, END, (STOP,))


@pytest.mark.parametrize(
    ("ids", "fed", "kept", "forced", "blocks", "truncated"),
    [
        pytest.param([7, STOP], "E", 2, [], (), False, id="text"),
        pytest.param([7, 8], "E", 2, [], (), True, id="text cut off"),
        pytest.param([START, PAD, PAD, END, 7, STOP], "EHHEE", 6, [1, 2, 3], ((1, 2),), False, id="a block"),
        pytest.param([7, START, PAD, PAD, END], "EEHH", 5, [2, 3, 4], ((2, 2),), True, id="cut off at its end"),
        pytest.param([7, START, PAD, PAD], "EEH", 2, [], (), True, id="cut off in a block"),
        pytest.param([7, START, PAD], "EE", 2, [], (), True, id="cut off at its first latent"),
        pytest.param([7, START], "E", 2, [], (), True, id="cut off at its mark"),
        # The model may write the pad where no block is open: a token like others.
        pytest.param([PAD, 7, PAD], "EE", 3, [], (), True, id="pads as text"),
        pytest.param(
            [START, PAD, PAD, END, START, PAD, PAD], "EHHEEH", 5, [1, 2, 3], ((1, 2),), True, id="cut off in the second"
        ),
    ],
)
def test_what_was_chosen_counts_and_nothing_else(
    ids: list[int], fed: str, kept: int, forced: list[int], blocks: Any, truncated: bool
) -> None:
    latents = [torch.full((3,), float(at)) for at in range(fed.count("H"))]
    made = Generated(ids, fed, latents=latents)
    found = sampled(4, made, [-0.5] * len(ids), TOKENS, recorded=True)
    assert (found.row, found.ids, found.blocks, found.truncated) == (4, ids[:kept], blocks, truncated)
    assert [at for at, logp in enumerate(found.logps) if logp != -0.5] == forced
    assert found.drawn == kept - len(forced)
    held = sum(k for _, k in blocks)
    assert found.latents is None if not held else torch.equal(found.latents, torch.stack(latents[:held]))
    assert sampled(4, made, [-0.5] * len(ids), TOKENS, recorded=False).latents is None


def test_an_answer_makes_the_row_that_training_makes_of_it(nano: Path, mixed: Path) -> None:
    finder = ImageFinder.beside(mixed, None)
    trained, asks = (load_encoder([str(nano)], finder, stage, K) for stage in ("stage2", "rl"))
    tokens = latent_tokens(trained)
    for row, record in enumerate(scan(mixed)[0]):
        wanted, prompt = trained.encode(record, row), asks.encode(record, row)
        start = len(prompt.input_ids)
        ids = wanted.input_ids[start:].tolist()
        assert prompt.runs == ()
        assert (prompt.labels == IGNORE).all()
        inside = [at > 0 and tokens.start in ids[max(0, at - K - 1) : at] for at in range(len(ids))]
        logps = [float("nan") if one else -1.0 for one in inside]
        blocks = tuple((at - start, k) for at, k in wanted.runs)
        made = row_of(prompt, Sampled(row, ids, logps, blocks, None, False))
        for name in ("input_ids", "position_ids", "image_positions", "pixel_values", "image_grid_thw"):
            assert torch.equal(getattr(made, name), getattr(wanted, name)), name
        assert made.runs == wanted.runs
        # The mark of a block's end is forced when it is sampled.
        assert torch.equal(made.labels, torch.where(wanted.labels == tokens.end, IGNORE, wanted.labels))


def opening(choose: Any, tokens: LatentTokens) -> Any:
    """Open a latent block at each answer's first token, and at its tenth."""

    def forced(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        chosen = choose(logits, turns)
        return torch.tensor(
            [tokens.start if t.step in (0, 9) else c for t, c in zip(turns, chosen.tolist(), strict=True)]
        )

    return forced


@pytest.mark.parametrize("policy", ["text", "through", "replay", "gaussian", "vlpo"])
def test_decoder_and_packed_forward_agree(policy: LatentPolicy, nano: Path, mixed: Path, monkeypatch: Any) -> None:
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "rl", K)
    loaded = load_model(
        nano, stage="rl", dtype=torch.float32, device=CPU, checkpointing=False, latent_heads=policy == "gaussian"
    )
    model, tokens = loaded.model.eval(), latent_tokens(encoder)
    if model.latent_heads is not None:
        torch.manual_seed(0)
        torch.nn.init.normal_(model.latent_heads.mean.weight, std=0.02)
    prompts = [encoder.encode(record, row) for row, record in enumerate(scan(mixed)[0][:4])]
    rows = cast(Any, SimpleNamespace(encoder=encoder, __getitem__=None))
    rows = type("Rows", (), {"encoder": encoder, "__getitem__": lambda _, row: prompts[row]})()
    config = SimpleNamespace(
        num_generations=2, temperature=1.3, max_completion_length=16, latent_size=K, micro_batch_tokens=300,
        rollout_rows=3,
    )  # fmt: skip
    run = cast(Any, SimpleNamespace(config=config, asked=lambda: False))
    learner = cast(Any, SimpleNamespace(state={"latent_policy": policy}, tower=loaded.tower))
    if policy != "text":
        made = rollout.sampler
        monkeypatch.setattr(rollout, "sampler", lambda *given: opening(made(*given), tokens))
    # The first prompt stands there twice, and its answers are not the same; another rank may decode the places after.
    chosen = {0: 0, 1: 1, 2: 0, 3: 3}
    answers = rollout._decode(run, learner, model, rows, chosen, seed=3)
    assert [answer.row for answer in answers] == [0, 0, 1, 1, 0, 0, 3, 3]
    alone = rollout._decode(run, learner, model, rows, {2: 0}, seed=3)
    assert [answer.ids for answer in alone] == [answer.ids for answer in answers[4:6]]
    assert {len(answer.blocks) for answer in answers} == ({0} if policy == "text" else {2})
    assert len({tuple(answer.ids) for answer in answers}) == 8
    samples = [row_of(prompts[answer.row], answer) for answer in answers]
    batch = collate(samples, 2 * K + 1 if policy == "through" else 1, encoder.dummy(0))
    if policy in RECORDED:
        batch = batch._replace(fed=torch.cat([cast(torch.Tensor, answer.latents) for answer in answers]))
    with torch.no_grad():
        density = policy if policy in ("gaussian", "vlpo") else None
        scores = cast(Any, model(loaded.tower.attach(batch), Scoring(1.3, density)))
    noted = torch.cat([torch.tensor([float("nan")] * len(prompts[a.row].input_ids) + a.logps) for a in answers])
    drawn = noted[torch.cat([one.tokens[one.labelled] for one in batch.passes]) + 1]
    assert len(drawn) == sum(answer.drawn for answer in answers)
    assert float((drawn - scores.logp).abs().max()) <= 1e-5
    # It is no comparison of a thing with itself: another temperature is far away.
    with torch.no_grad():
        other = cast(Any, model(loaded.tower.attach(batch), Scoring(1.0, density)))
    assert float((drawn - other.logp).abs().max()) > 1e-2


def test_a_stop_is_looked_for_before_each_token() -> None:
    choose = Recorder(greedy, 1.0, lambda: True)
    with pytest.raises(Stopped):
        choose(torch.zeros(1, 5), [Turn(0, 0)])


def test_limits_are_those_of_training() -> None:
    config = SimpleNamespace(max_completion_length=16, latent_size=K, micro_batch_tokens=300, rollout_rows=3)
    run = cast(Any, SimpleNamespace(config=config))
    assert rollout.limits_of(run, "through") == Limits(16, K, K, 300, 3)
    assert rollout.limits_of(run, "text").fixed_run is None

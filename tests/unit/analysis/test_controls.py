"""The conditions against plain transformers: no cache, one row at a time, every token's row computed anew.

R runs of a row, k latents a run, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import alike
from test_generate import World, assert_same, both, sharpen, slowly

from mirage_ds.analysis.alike import sentence
from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls import conditions as making
from mirage_ds.analysis.controls import run
from mirage_ds.analysis.controls.bank import Bank
from mirage_ds.analysis.controls.conditions import KNOWN, First, Given, Material, Together, choose_partners
from mirage_ds.analysis.controls.paths import fork_of, run_paths, verdict
from mirage_ds.analysis.controls.report import summarize
from mirage_ds.analysis.controls.run import run_conditions
from mirage_ds.analysis.controls.spec import CONDITIONS, ControlsSpec, parse_names
from mirage_ds.analysis.controls.teach import Outcome, rows_of
from mirage_ds.analysis.inspect import probe
from mirage_ds.cli import main
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record import Record
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import answer_records, load_decoder
from mirage_ds.evaluate.prompts import prompt_of
from mirage_ds.evaluate.report import prompt_hash
from mirage_ds.evaluate.scoring import Prediction, bootstrap
from mirage_ds.model import kv_cache
from mirage_ds.model.choose import greedy
from mirage_ds.model.generate import generate
from mirage_ds.model.kv_cache import bytes_of_block
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import Limits, latent_tokens

K, SEED = 3, 11
# Transformers' layers take their norms and rotary angles in float32, also in a float64 model.
CLOSE = 1e-5
LIMITS = Limits(12, longest_run=1, fixed_run=K)
REASONING, PLANNING = "vsp-spatial-reasoning", "vsp-spatial-planning"
PLANNING_ROWS = Path(__file__).parents[3] / "data/sample_planning.jsonl"


def sized(batch_size: int) -> ControlsSpec:
    return ControlsSpec(data_path=Path(), seed=SEED, batch_size=batch_size)


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def file(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two levels: with and without image, the run in the middle, in front, and two runs."""
    rows = [json.loads(line) for line in mixed.read_text().splitlines()]
    chosen = [rows[number] | {"level": level} for number, level in ((0, 3), (1, 3), (4, 4), (5, 3), (8, 4))]
    for row in chosen:
        row["image_output"] = str(mixed.parent / row["image_output"])
        if "image_input" in row:
            row["image_input"] = str(mixed.parent / row["image_input"])
    chosen[1]["text_output"] = "The answer is \\boxed{B}"
    chosen[3]["text_output"] = "So <output_image>it goes<output_image> on.\\boxed{C}"
    chosen[3]["image_output"] = [chosen[3]["image_output"], str(mixed.parent / "out6.png")]
    return write_jsonl(tmp_path_factory.mktemp("controls") / "rows.jsonl", chosen)


@pytest.fixture(scope="module")
def records(file: Path) -> list[Record]:
    return scan(file)[0]


@pytest.fixture(scope="module")
def folder(nano: Path, file: Path, records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharp nano that opens a run where an answer begins: there its output matrix likes `<|latent_start|>`."""
    folder = tmp_path_factory.mktemp("models") / "opens"
    sharpen(nano, folder)
    plain, _ = both(folder)
    encoder = load_encoder([str(folder)], ImageFinder.beside(file, None), "sft", 1)
    states = [
        plain.model.language_model(
            inputs_embeds=plain.get_input_embeddings()(one.input_ids)[None], position_ids=one.position_ids[:, None]
        ).last_hidden_state[0, -1]
        for one in (encoder.encode_prompt(record, 0) for record in records)
    ]
    mean = torch.stack(states).mean(0).detach()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][encoder.id_of("<|latent_start|>")] = 60 * mean / mean.square().sum()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mirage": {"stage": "stage2", "latent_size": K}}))
    return folder


@pytest.fixture(scope="module")
def bench(folder: Path, file: Path) -> Bench:
    loaded = both(folder)[1]
    encoder = load_encoder([str(folder)], ImageFinder.beside(file, None), "stage1", K)
    return Bench(loaded.model, loaded.tower, encoder, LIMITS)


@pytest.fixture(scope="module")
def found(bench: Bench, records: list[Record]) -> dict[str, list[Outcome]]:
    return run_conditions(bench, records, CONDITIONS, sized(2))[0]


class Oracle:
    """What the conditions are, written down row by row on plain transformers."""

    def __init__(self, folder: Path, encoder: Encoder, records: Sequence[Record]):
        self.plain = both(folder)[0]
        self.encoder = encoder
        self.tokens = latent_tokens(encoder)
        self.samples = [encoder.encode(record, row) for row, record in enumerate(records)]
        self.prompts = [encoder.encode_prompt(record, row) for row, record in enumerate(records)]
        self.partners = choose_partners(records, SEED)
        # The pads' own states, run by run, slot by slot.
        self.own = [self.teach(row, lambda run, slot, own: own)[1] for row in range(len(records))]
        pad = self.plain.get_input_embeddings().weight[self.tokens.pad].detach()
        self.targets = [self.pooled(row) for row in range(len(records))]
        self.material = Material(self.own, self.targets, self.partners, pad, SEED)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        return list(self.plain.model.get_image_features(pixels, grid, return_dict=True).pooler_output)

    def pooled(self, row: int) -> torch.Tensor:
        """(R, k, H): of each helper, k runs of consecutive features, averaged; the rest is dropped."""
        sample, runs = self.samples[row], []
        for features in self.features(sample.helper_pixel_values, sample.helper_grid_thw):
            size = len(features) // K
            runs.append(torch.stack([features[slot * size : (slot + 1) * size].mean(0) for slot in range(K)]))
        return torch.stack(runs)

    @torch.no_grad()
    def teach(self, row: int, feed: Callable | None) -> tuple[float, torch.Tensor]:
        """Log-likelihood of a row's answer, and what its slots were fed (R, k, H); without feed: no run at all."""
        sample, (pad, start, end, (stop, _)) = self.samples[row], self.tokens
        ids, positions = sample.input_ids.tolist(), sample.position_ids
        first_end = ids.index(end)
        last = len(ids) - 1 - ids[::-1].index(stop)
        scored = [at for at in range(first_end + 1, last + 1) if ids[at] not in (pad, start, end)]
        if feed is None:
            kept = [at for at in range(len(ids)) if ids[at] not in (pad, start, end)]
            scored = [kept.index(at) for at in scored]
            answer = int((sample.labels >= 0).nonzero()[0])
            ids = [ids[at] for at in kept]
            onwards = positions[:, :answer].max() + 1 + torch.arange(len(ids) - answer)
            positions = torch.cat([positions[:, :answer], onwards.expand(3, -1)], dim=1)
        x = self.plain.get_input_embeddings()(torch.tensor(ids))
        if len(sample.image_grid_thw):
            image = torch.tensor(ids) == self.plain.config.image_token_id
            x[image] = torch.cat(self.features(sample.pixel_values, sample.image_grid_thw))

        def states(upto: int) -> torch.Tensor:
            return self.plain.model.language_model(
                inputs_embeds=x[None, :upto], position_ids=positions[:, None, :upto], use_cache=False
            ).last_hidden_state[0]

        fed: list[list[torch.Tensor]] = []
        for at, token in enumerate(ids):
            if token == start:
                fed.append([])
            if token == pad:
                assert feed is not None
                x[at] = feed(len(fed) - 1, len(fed[-1]), states(at)[-1])
                fed[-1].append(x[at].clone())
        logits = self.plain.lm_head(states(len(ids)))
        logits[:, [pad, start, end]] = float("-inf")
        chosen = logits.log_softmax(-1)
        mean = sum(float(chosen[at - 1, ids[at]]) for at in scored) / len(scored)
        return mean, torch.stack([torch.stack(run) for run in fed]) if fed else torch.empty(0)

    def feed(self, name: str, row: int) -> Callable:
        """What a condition feeds in a row: (run, slot, own state) → (H,)."""
        if name == "own":
            return lambda run, slot, own: own
        if name == "first":
            kept: dict[int, torch.Tensor] = {}
            return lambda run, slot, own: kept.setdefault(run, own) if slot else kept.update({run: own}) or own
        if name == "zero":
            return lambda run, slot, own: torch.zeros_like(own)
        if name == "text":
            return lambda run, slot, own: self.material.pad
        known = {
            "swap": lambda: self.own[self.partners[row]],
            "oracle": lambda: self.targets[row],
            # Drawn: what they are is tested by itself.
            "random": lambda: making.random(self.material)[row],
            "matched": lambda: making.matched(self.material)[row],
        }[name]()
        return lambda run, slot, own: known[min(run, len(known) - 1), slot]

    def decode(self, name: str, row: int) -> Generated:
        """A greedy answer."""
        world = World(self.plain, None, self.encoder, self.prompts, self.tokens)
        if name != "off":
            return slowly(world, self.prompts[row], LIMITS, greedy, self.feed(name, row))
        pad, start, end, _ = self.tokens

        def choose(logits: torch.Tensor, step: int) -> int:
            order = logits[0].argsort(descending=True).tolist()
            return next(token for token in order if token not in (pad, start, end))

        return slowly(world, self.prompts[row], LIMITS, choose)


@pytest.fixture(scope="module")
def oracle(folder: Path, bench: Bench, records: list[Record]) -> Oracle:
    return Oracle(folder, bench.encoder, records)


# ------------------------------------------------------------------------------------------- conditions on the model


@pytest.mark.parametrize("name", CONDITIONS)
def test_condition_is_the_slow_loop(
    bench: Bench, records: list[Record], oracle: Oracle, found: dict[str, list[Outcome]], name: str
) -> None:
    # Once more, looked at from inside: ids alone might be the same whatever is fed.
    known = Given(KNOWN[name](oracle.material)) if name in KNOWN else First() if name == "first" else None
    prompts = bench.prompts([prompt_of(row.sample) for row in rows_of(bench, records, range(len(records)))])
    feed = Together([known], 0 if name == "off" else None, bench.tokens)
    traced = generate(bench.model, prompts, bench.tokens, LIMITS, feed.choose, trace=True, latents=feed)
    for row, outcome in enumerate(found[name]):
        slow = oracle.decode(name, row)
        assert_same(traced[row], slow)
        assert outcome.answer.ids == slow.ids
        wanted, _ = oracle.teach(row, None if name == "off" else oracle.feed(name, row))
        assert outcome.log_likelihood == pytest.approx(wanted, abs=CLOSE)


def test_conditions_differ_on_this_model(found: dict[str, list[Outcome]]) -> None:
    """Else the slow loop would agree with anything."""
    for one, other in ((a, b) for a in CONDITIONS for b in CONDITIONS if a < b):
        apart = [abs(a.log_likelihood - b.log_likelihood) for a, b in zip(found[one], found[other], strict=True)]
        # One record of a random model may lie near: ten times what the loop is held to, the others a hundred times.
        assert min(apart) > 10 * CLOSE, (one, other)
        assert sum(far > 100 * CLOSE for far in apart) >= len(apart) - 1, (one, other)
    assert all(outcome.answer.runs[:1] == [K] for name in CONDITIONS if name != "off" for outcome in found[name])
    assert all(outcome.answer.runs == [] for outcome in found["off"])
    answers = Counter(tuple(tuple(outcome.answer.ids) for outcome in found[name]) for name in CONDITIONS)
    # Greedy answers of a random model lie close together: which of them coincide differs from one process to the next.
    assert len(answers) >= 5


def test_own_is_ordinary_decoding(folder: Path, file: Path, records: list[Record]) -> None:
    decoder = load_decoder(folder, ImageFinder.beside(file, None))
    encoder = replace(decoder.encoder, stage="stage2", latent_size=K)
    loaded = decoder.loaded
    assert loaded.tower is not None
    bench = Bench(loaded.model, loaded.tower, encoder, LIMITS)
    outcomes, _ = run_conditions(bench, records, ["own"], sized(2))
    assert list(outcomes) == ["own"]
    assert [one.answer for one in outcomes["own"]] == answer_records(decoder, records, LIMITS, batch_size=2)
    assert any(one.answer.text for one in outcomes["own"])


def test_batch_size_and_the_other_conditions_do_not_matter(
    bench: Bench, records: list[Record], found: dict[str, list[Outcome]]
) -> None:
    again, _ = run_conditions(bench, records, ["swap", "random"], sized(5))
    assert list(again) == ["own", "swap", "random"]
    for name, outcomes in again.items():
        for one, other in zip(outcomes, found[name], strict=True):
            assert one.answer == other.answer
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=CLOSE)


def test_room_for_all_conditions_is_looked_for_before_the_first(
    bench: Bench, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(bench.encoder.encode_prompt(record, 0).input_ids) for record in records)
    # Of `own` alone; several answers of a prompt need a block more.
    room = (-(-(longest + LIMITS.new_tokens) // kv_cache.BLOCK) + 0.5) * bytes_of_block(bench.model) / 1e9
    monkeypatch.setattr(run, "decode", lambda *_: pytest.fail("decoded"))
    tight = replace(bench, limits=replace(LIMITS, cache_gb=room))
    with pytest.raises(UserError, match=rf"^record \d: keys and values of its {longest} prompt tokens"):
        run_conditions(tight, records, ["own", "zero", "random"], sized(2))


def test_prompt_is_the_encoders(bench: Bench, records: list[Record]) -> None:
    for row, record in enumerate(records):
        cut, wanted = prompt_of(bench.encoder.encode(record, row)), bench.encoder.encode_prompt(record, row)
        for name in ("input_ids", "labels", "position_ids", "image_positions", "pixel_values", "image_grid_thw"):
            assert torch.equal(getattr(cut, name), getattr(wanted, name)), name
        assert (cut.runs, cut.row) == (wanted.runs, wanted.row)


# ------------------------------------------------------------------------------------------------- the vectors alone


def material(rows: int = 400, width: int = 5, runs: Callable[[int], int] = lambda row: 1) -> Material:
    """Own latents whose slots differ in mean and spread."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(K, width, width, generator=generator)
    own = [
        torch.stack([torch.randn(runs(row), width, generator=generator) @ mix[slot] + slot for slot in range(K)], 1)
        for row in range(rows)
    ]
    return Material(own, [], [], torch.arange(float(width)), seed=2)


def test_random_vectors_have_the_mean_norm_and_any_direction() -> None:
    given = material(runs=lambda row: 1 + row % 2)
    drawn = making.random(given)
    assert [one.shape for one in drawn] == [one.shape for one in given.own]
    mean = sum(float(vector.norm()) for one in given.own for run in one for vector in run) / (600 * K)
    vectors = torch.cat([one.flatten(0, 1) for one in drawn])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.full((1800,), mean))
    # A uniform direction: coordinates of mean 0 and variance norm² / H, uncorrelated; five standard errors.
    error = mean**2 / 5 / 1800**0.5
    assert ((vectors.T @ vectors) / 1800 - mean**2 / 5 * torch.eye(5)).abs().max() < 5 * error * 2**0.5
    assert vectors.mean(0).abs().max() < 5 * (mean**2 / 5 / 1800) ** 0.5
    assert torch.equal(drawn[7], making.random(given)[7])
    assert not torch.equal(drawn[7], making.random(given._replace(seed=3))[7])


def test_matched_vectors_have_each_slots_mean_and_covariance() -> None:
    # Many runs a row, so that the draws are many and the shrinkage is small.
    given = material(rows=10, runs=lambda row: 100)
    drawn, own = torch.cat(making.matched(given)).double(), torch.cat(given.own).double()
    for slot in range(K):
        covariance = torch.cov(own[:, slot].T)
        variances = covariance.diagonal()
        assert ((drawn[:, slot] - own[:, slot]).mean(0).abs() < 5 * (variances / 1000).sqrt()).all()
        error = ((torch.outer(variances, variances) + covariance**2) / 1000).sqrt()
        # The shrinkage moves entries by a few thousandths of the mean variance here.
        assert ((torch.cov(drawn[:, slot].T) - covariance).abs() < 5 * error + 1e-2 * variances.mean()).all()
    assert not torch.equal(drawn[0], drawn[100])
    with pytest.raises(UserError, match=r"--latents matched: 2 latent block\(s\)"):
        making.matched(material(rows=2))


def test_swap_is_a_derangement_within_levels() -> None:
    def of(level: Any, line: int) -> Record:
        return Record(line, "", "", (), (), {"level": level} if level else {"map_desc": [[0]] * 4})

    sizes = {3: 2, 4: 3, 5: 40, None: 7}
    many = [of(level, 0) for level, count in sizes.items() for _ in range(count)]
    random.Random(1).shuffle(many)
    for seed in range(20):
        partners = choose_partners(many, seed)
        assert sorted(partners) == list(range(52))
        assert all(one != other for one, other in enumerate(partners))
        # A record without a level has its map's side, here 4.
        level = [str(record.extra.get("level", 4)) for record in many]
        assert all(level[one] == level[other] for one, other in enumerate(partners))
    assert choose_partners(many, 1) == choose_partners(many, 1) != choose_partners(many, 2)
    with pytest.raises(UserError, match="record on line 9 is the only one of level 6"):
        choose_partners([*many, of(6, 9)], 1)


def test_swap_takes_the_partners_runs_and_its_last_again() -> None:
    given = material(rows=3, runs=lambda row: row + 1)._replace(partners=[2, 0, 1])
    swapped = making.swap(given)
    # Three, though the record itself has one: its answer may have more.
    assert torch.equal(swapped[0], given.own[2])
    assert torch.equal(swapped[1], given.own[0][[0, 0]])
    assert torch.equal(swapped[2], given.own[1][[0, 1, 1]])


def test_conditions_that_know_their_vectors_are_those_of_the_page() -> None:
    assert {"own", "first", "off", *KNOWN} == set(CONDITIONS)
    assert parse_names("zero, own ,zero,path") == ["own", "zero", "path"]
    assert parse_names("swap") == ["own", "swap"]
    assert parse_names("path") == ["path"]
    with pytest.raises(UserError, match=r"no condition 'orakel' \(did you mean 'oracle'\?\)"):
        parse_names("own,orakel")
    with pytest.raises(UserError, match="names no condition"):
        parse_names(" ,")


# ------------------------------------------------------------------------------------------------------------- report


def test_summary_pairs_with_own_by_record(records: list[Record], found: dict[str, list[Outcome]]) -> None:
    # Answers as they might be: the letters of the records are A, B, A, C, A.
    said = {"own": "ABACB", "zero": "BBBBB", "swap": "ABACA"}
    outcomes = {
        name: [
            Outcome(Prediction(f"\\boxed{{{letter}}}", [K] if row else [], []), found[name][row].log_likelihood)
            for row, letter in enumerate(letters)
        ]
        for name, letters in said.items()
    }
    conditions, answers = summarize(records, outcomes, REASONING, SEED)
    assert conditions["own"]["score_difference"] is None
    assert {name: one["score"]["mean"] for name, one in conditions.items()} == {"own": 0.8, "zero": 0.2, "swap": 1.0}
    assert conditions["zero"]["opened"] == 4
    zero = conditions["zero"]["score_difference"]
    assert zero["mean"] == pytest.approx(-0.6)
    assert (zero["p"], zero["p_holm"]) == (0.25, 0.5)
    apart = [a.log_likelihood - b.log_likelihood for a, b in zip(outcomes["zero"], outcomes["own"], strict=True)]
    log = conditions["zero"]["log_likelihood_difference"]
    assert (log["low"], log["high"]) == bootstrap(apart, SEED)
    assert log["mean"] == pytest.approx(sum(apart) / 5)
    assert answers[4]["conditions"]["own"]["metrics"] == {"correct": False, "invalid": False, "runs": 1, "latents": K}


# -------------------------------------------------------------------------------------------------------------- paths


def shortest(board: Sequence[Sequence[int]]) -> list[list[str]]:
    """All shortest paths, by trying every word of moves of growing length."""
    cells = {(r, c): kind for r, row in enumerate(board) for c, kind in enumerate(row)}
    start = next(cell for cell, kind in cells.items() if kind == 1)
    moves = {"LEFT": (0, -1), "DOWN": (1, 0), "RIGHT": (0, 1), "UP": (-1, 0)}
    ways: list[tuple[tuple[int, int], list[str]]] = [(start, [])]
    while not any(cells[cell] == 2 for cell, _ in ways):
        ways = [
            ((cell[0] + dr, cell[1] + dc), [*way, name])
            for cell, way in ways
            for name, (dr, dc) in moves.items()
            if cells.get((cell[0] + dr, cell[1] + dc), -1) != -1
        ]
    return [way for cell, way in ways if cells[cell] == 2]


@pytest.fixture(scope="module")
def planning() -> list[Record]:
    return scan(PLANNING_ROWS)[0]


def test_forks_are_the_records_with_another_shortest_path(planning: list[Record]) -> None:
    forks = [fork_of(record, SEED) for record in planning]
    assert 3 < sum(fork is None for fork in forks) < len(forks) - 3
    chosen: set[tuple[str, ...]] = set()
    for record, fork in zip(planning, forks, strict=True):
        every = shortest(record.extra["map_desc"])
        assert (fork is None) == (len(every) == 1)
        if fork:
            own, other = map(list, fork.paths)
            assert own == record.extra["path"]
            assert other in every
            assert other != own
            many = {fork.paths[1] for seed in range(30) if (fork := fork_of(record, seed))}
            assert {tuple(way) for way in every} - {tuple(own)} >= many
            chosen |= many if len(every) > 2 else set()
    assert len(chosen) > 2
    # No map, no picture, two runs, and an answer that is no shortest path.
    at = next(at for at, fork in enumerate(forks) if fork)
    assert fork_of(replace(planning[at], extra={}), SEED) is None
    assert fork_of(replace(planning[at], image_input=()), SEED) is None
    assert fork_of(replace(planning[at], image_output=("a.png", "b.png")), SEED) is None
    detour = ", ".join([*planning[at].extra["path"], "UP", "DOWN"])
    assert fork_of(replace(planning[at], text_output=f"\\boxed{{{detour}}}"), SEED) is None


def test_verdict_reads_the_boxed_moves() -> None:
    a, b = ("RIGHT", "DOWN"), ("DOWN", "RIGHT")
    assert verdict("\\boxed{L} so \\boxed{R, D}", a, b) == "injected"
    assert verdict("\\boxed{down right}", a, b) == "other"
    assert [verdict(text, a, b) for text in ("\\boxed{RRD}", "R, D", "\\boxed{}")] == ["neither"] * 3


def test_paths_feed_the_targets_of_either_path_and_count_who_follows(
    bench: Bench, planning: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(bench, encoder=replace(bench.encoder, finder=ImageFinder.beside(PLANNING_ROWS, None)))
    small = sorted(planning, key=lambda record: record.extra["level"])
    forks = [fork for record in small if (fork := fork_of(record, SEED))][:4]
    # Row 2 i is fed A of the i-th fork, row 2 i + 1 B. The first two answer as fed, the third always A.
    says = [[0, 1], [0, 1], [0, 0], [None, None]]
    fed: dict[int, torch.Tensor] = {}

    def decode(bench: Bench, rows: Any, latents: Any) -> list[list[int]]:
        (given,) = latents
        fed.update({row.sample.row: vectors[0] for row, vectors in zip(rows, given.vectors, strict=True)})
        return [[row.sample.row for row in rows]]

    def answer(row: int, encoder: Encoder) -> Prediction:
        path = says[row // 2][row % 2]
        return Prediction(
            "?" if path is None else f"\\boxed{{{', '.join(forks[row // 2].paths[path])}}}",
            [] if path is None else [K],
            [],
        )

    monkeypatch.setattr("mirage_ds.analysis.controls.paths.decode", decode)
    monkeypatch.setattr("mirage_ds.analysis.controls.paths.answer_of", answer)
    straight = next(record for record in small if not fork_of(record, SEED))
    report = run_paths(bench, [straight, *(fork.record for fork in forks)], PLANNING, SEED, batch_size=3)
    assert (report["records"], report["left_out"]) == (4, 1)
    assert [one["line"] for one in report["answers"]] == [fork.record.line for fork in forks]
    assert [one["follows"] for one in report["answers"]] == [
        {"A": "injected", "B": "injected"},
        {"A": "injected", "B": "injected"},
        {"A": "injected", "B": "other"},
        {"A": "neither", "B": "neither"},
    ]
    assert (report["difference"], report["opened"]) == (0.5, 6)
    assert sorted(fed) == list(range(8))
    for at, fork in enumerate(forks):
        # A's picture is the record's own helper image, to the pixel; B's is another.
        own = rows_of(bench, [fork.record], [0])[0].targets
        assert torch.equal(fed[2 * at], own[0])
        assert not torch.allclose(fed[2 * at + 1], own[0], atol=1e-3)


def test_paths_refuse_what_has_none(bench: Bench, planning: list[Record]) -> None:
    with pytest.raises(UserError, match=f"these records are of {REASONING}"):
        run_paths(bench, planning, REASONING, SEED, batch_size=3)
    with pytest.raises(UserError, match="no record whose own answer is one of several shortest paths"):
        run_paths(bench, [record for record in planning if not fork_of(record, SEED)], PLANNING, SEED, batch_size=3)


def test_own_latents_are_measured_and_probed(planning: list[Record]) -> None:
    draw = torch.Generator().manual_seed(0)

    def row(bits: int) -> list[int]:
        return [-(bits >> at & 1) for at in range(3)]

    # 64 boards of one size; a turned or mirrored one is the same map.
    boards = [[[1, *row(at)], [0, *row(at >> 3)], [0] * 4, [0, 0, 0, 2]] for at in range(64)]
    records = [Record(at, "", "", (), (), {"map_desc": board}) for at, board in enumerate(boards)]
    own = [torch.randn(1 + at % 2, K, 6, generator=draw) for at in range(len(boards))]
    first = torch.stack([one[0] for one in own])
    found = run.looked_at(records, own)
    assert found["latents"] == pytest.approx(alike.slowly(first), rel=1e-9)
    (asked,) = probe.questions(records)
    wanted = probe.read({"all latents": first.flatten(1)}, asked)["cells"]["all latents"]
    assert found["probe"] == {"cells (4 × 4)": wanted._asdict()}
    # What is called map_desc and is no board is not asked for.
    assert run.looked_at([replace(one, extra={"map_desc": "north"}) for one in records], own)["probe"] == {}


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable]:
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mirage-ds", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_controls_the_command(
    folder: Path, file: Path, records: list[Record], oracle: Oracle, tmp_path: Path, call: Callable,
    found: dict[str, list[Outcome]],
) -> None:  # fmt: skip
    out, page, bank = tmp_path / "deep" / "out.json", tmp_path / "out.md", tmp_path / "bank"
    words = ("--latents", "zero,off", "--task", REASONING, "--max_new_tokens", 12, "--seed", SEED, "--batch_size", 3)
    words += ("--out", out, "--markdown", page, "--latent_bank", bank)
    code, said, error = call("controls", folder, "--data_path", file, *words)
    assert code == 0, error
    report = json.loads(out.read_text())
    assert list(report["conditions"]) == ["own", "zero", "off"]
    assert report["settings"]["slots"] == K
    assert report["latents"] == pytest.approx(alike.slowly(torch.stack([one[0] for one in oracle.own])), abs=1e-3)
    assert sentence(report["latents"]) in " ".join(said.split())
    assert sentence(report["latents"]) in page.read_text()
    # Five records are too few maps, and name none.
    assert report["probe"] == {}
    assert [one["line"] for one in report["answers"]] == [1, 2, 3, 4, 5]
    for name, one in report["conditions"].items():
        # In float32 here, in float64 there.
        wanted = sum(outcome.log_likelihood for outcome in found[name]) / 5
        assert one["log_likelihood"]["mean"] == pytest.approx(wanted, abs=1e-3)
        row = f"{one['log_likelihood']['mean']:.3f} ({one['log_likelihood']['low']:.3f}, "
        assert row in said
        assert f"| {name} | {one['metrics']['latents']:.1f} | {row}" in page.read_text()
    kept, wanted = Bank(bank, "swap", oracle.own[0].shape[1:], SEED), KNOWN["swap"](oracle.material)
    for record, vectors in zip(records, wanted, strict=True):
        fed = kept.of(prompt_hash(record, ImageFinder.beside(file, None)))
        torch.testing.assert_close(fed, vectors.float(), rtol=1e-3, atol=1e-3)


def test_controls_refuse_in_one_sentence(
    nano: Path, folder: Path, file: Path, mixed: Path, tmp_path: Path, call: Callable
) -> None:
    lone = write_jsonl(tmp_path / "lone.jsonl", [json.loads(line) for line in file.read_text().splitlines()][:3])
    cases = [
        ((nano, file), "--run_length: conditions are compared at the same number of slots"),
        ((folder, file, "--run_length", "model"), "--run_length: conditions are compared at the same number of slots"),
        ((folder, mixed), "record on line 3", "text_output: no latent block", "--latents", "zero"),
        ((folder, mixed), "record on line 3, image_output: stage1 needs a helper image"),
        ((folder, lone), "--latents swap: the record on line 3 is the only one of level 4"),
        ((folder, file, "--latents", "sawp"), "--latents: no condition 'sawp' (did you mean 'swap'?)"),
        ((folder, file, "--latents", "path"), f"--latents path is about the paths of {PLANNING}"),
    ]
    for (model, data, *words), said, *more in cases:
        # Some refusals wait for the model's own answers; this one's never end by themselves.
        flags = ["--task", REASONING, "--max_new_tokens", 12, *words]
        flags += [word for word in more if word.startswith("--") or word == "zero"]
        code, _, error = call("controls", model, "--data_path", data, *flags)
        assert code == 2, (said, error)
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert said in error


def test_evaluate_with_latents_is_the_controls(folder: Path, file: Path, tmp_path: Path, call: Callable) -> None:
    words = ("--data_path", file, "--latents", "zero,swap", "--task", REASONING, "--max_new_tokens", 12)
    reports = []
    for command in ("controls", "evaluate"):
        out = tmp_path / f"{command}.json"
        code, _, error = call(command, folder, *words, "--seed", SEED, "--batch_size", 3, "--out", out)
        assert code == 0, error
        reports.append(json.loads(out.read_text()))
    assert reports[0] == reports[1]
    for more, said in [
        (("--decoding", "paper"), "--latents decodes greedily"),
        (("--no_latents",), "--latents replaces latents, and --no_latents says that there are none"),
    ]:
        code, _, error = call("evaluate", folder, *words, *more)
        assert code == 2
        assert error.startswith(f"error: {said}")

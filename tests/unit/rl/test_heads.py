"""Sampled latents: what the heads make, how they are decoded, recorded, saved and opened again.

m rows that come to a slot, L latents, H hidden, k latents a block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import zero_to_fp32
from safetensors.torch import load_file
from test_latent_generate import ROWS, TRAINED, K, inputs_of, saved
from transformers import AutoModelForImageTextToText

from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.engine import save as export
from mirage_ds.engine.checkpoint import STATE_FILE
from mirage_ds.engine.frozen import digest
from mirage_ds.engine.save import Parts, change_rows, export_checkpoint
from mirage_ds.engine.spelling import read_base
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, answer_records, load_decoder, run_limits, save_decoder, seeds_of
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.evaluate.report import evaluate_file
from mirage_ds.evaluate.spec import EvaluateSpec
from mirage_ds.files import HEADS, delete_model
from mirage_ds.model.forward import Scoring
from mirage_ds.model.generate import generate
from mirage_ds.model.latent_heads import START, LatentHeads, gaussian_logp, vlpo_logp
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import latent_tokens, noise

TOKENS = 24


@pytest.fixture(scope="module")
def gaussian(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with heads that have learnt something, whose answers open latent blocks."""
    decoder, folder = saved(nano, mixed, tmp_path_factory.mktemp("models"))
    model = decoder.loaded.model
    model.latent_heads = LatentHeads(model.head.weight.shape[1])
    torch.manual_seed(2)
    for parameter in model.latent_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    out = folder.with_name("gaussian")
    save_decoder(decoder, out, TRAINED | dict(stage="rl"))
    return out


def opened(folder: Path, mixed: Path) -> Decoder:
    return load_decoder(folder, ImageFinder.beside(mixed, None))


def test_heads_start_at_zero_mean_shift_and_a_twentieth_of_the_states_size() -> None:
    torch.manual_seed(0)
    states = 3 * torch.randn(5, 16)
    mean, log_sigma = LatentHeads(16)(states)
    assert torch.equal(mean, states)
    torch.testing.assert_close(log_sigma.exp()[:, 0], START * states.square().mean(1).sqrt())


def test_a_folder_keeps_its_heads(gaussian: Path, mixed: Path, tmp_path: Path) -> None:
    heads = opened(gaussian, mixed).loaded.model.latent_heads
    assert not any(p.requires_grad for p in heads.parameters())
    assert float(heads.mean.weight.std()) > 0.01
    config = AutoModelForImageTextToText.from_pretrained(gaussian).config
    change_rows(gaussian, tmp_path / "more", config.text_config.vocab_size + 8, 0)
    again = opened(tmp_path / "more", mixed).loaded.model.latent_heads
    assert all(torch.equal(one, other) for one, other in zip(heads.parameters(), again.parameters(), strict=True))
    (tmp_path / "more" / HEADS).write_bytes((gaussian / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"heads.safetensors: its tensors are not those of a model of width 128"):
        opened(tmp_path / "more", mixed)
    (tmp_path / "more" / HEADS).unlink()
    with pytest.raises(UserError, match=r"heads.safetensors: no such file, and config.json says"):
        opened(tmp_path / "more", mixed)
    save_decoder(opened(gaussian, mixed), tmp_path / "copy", TRAINED)
    assert (tmp_path / "copy" / HEADS).is_file()
    delete_model(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_mean_is_fed_here_and_by_plain_transformers(gaussian: Path, mixed: Path) -> None:
    decoder = opened(gaussian, mixed)
    records = [scan(mixed)[0][row] for row in ROWS]
    wanted = answer_records(decoder, records, run_limits(decoder, TOKENS, 8, "trained"))
    assert any(K in one.runs for one in wanted)
    inputs = inputs_of(decoder, [decoder.encoder.encode_prompt(record, 0) for record in records])
    model = AutoModelForImageTextToText.from_pretrained(gaussian, trust_remote_code=True, dtype=torch.float32).eval()
    given: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    text, heads = model.model.language_model, decoder.loaded.model.latent_heads
    text.register_forward_pre_hook(lambda _, *all: given.append(all[1]["inputs_embeds"][:, -1]), with_kwargs=True)
    text.register_forward_hook(lambda *all: made.append(all[2][0][:, -1]))
    prompt = inputs.pop("input_ids")
    found = model.generate(prompt, **inputs, do_sample=False, max_new_tokens=TOKENS)[:, prompt.shape[1] :]
    assert [row[: len(one.ids)].tolist() for row, one in zip(found, wanted, strict=True)] == [one.ids for one in wanted]
    pad, fed = decoder.encoder.id_of("<|latent_pad|>"), 0
    for row, one in enumerate(wanted):
        for step in (step for step, token in enumerate(one.ids[:-1]) if token == pad):
            h, fed = made[step][row], fed + 1
            shifted = h + heads.mean.weight @ h + heads.mean.bias
            torch.testing.assert_close(given[step + 1][row], shifted, rtol=0, atol=1e-5)
            assert float((shifted - h).norm() / h.norm()) > 0.05
    assert fed >= K


def decoded(decoder: Decoder, prompts: list[Sample], seeds: list[int]) -> list[Generated]:
    model, encoder = decoder.loaded.model, decoder.encoder
    given = prompts_of(model, decoder.tower, encoder, prompts), latent_tokens(encoder)
    limits = run_limits(decoder, TOKENS, 8, "trained")
    return generate(model, *given, limits, noise=noise(seeds) if seeds else None, record=True, trace=True)


def test_draws_are_recorded_and_nothing_depends_on_the_neighbours(gaussian: Path, mixed: Path) -> None:
    decoder = opened(gaussian, mixed)
    prompts = [decoder.encoder.encode_prompt(scan(mixed)[0][row], row) for row in ROWS]
    together = decoded(decoder, prompts, [10 + row for row in range(len(ROWS))])
    assert sum(len(one.latents) for one in together) >= K
    alone = [decoded(decoder, [prompt], [10 + row])[0] for row, prompt in enumerate(prompts)]
    model, z = decoder.loaded.model, []
    for one, other in zip(together, alone, strict=True):
        assert (one.ids, len(one.latents)) == (other.ids, one.fed.count("H"))
        places = [place for place, kind in enumerate(one.fed) if kind == "H"]
        for latent, same, place in zip(one.latents, other.latents, places, strict=True):
            torch.testing.assert_close(latent, same, rtol=0, atol=1e-4)
            assert torch.equal(latent, one.inputs[place + 1])
            mean, log_sigma = model.latent_heads(one.hidden[place][None])
            z.append((latent - mean[0]) / log_sigma.exp())
    drawn = torch.cat(z)
    # Of some hundred numbers or more, standard normal.
    assert abs(float(drawn.mean())) < 5 / len(drawn.flatten()) ** 0.5
    assert abs(float(drawn.std()) - 1) < 5 / (2 * len(drawn.flatten())) ** 0.5
    other = decoded(decoder, prompts, [1] * len(ROWS))
    assert not torch.equal(latents_of(other)[0], latents_of(together)[0])


def latents_of(made: list[Generated]) -> torch.Tensor:
    """In the order of a packed batch: (L, H)."""
    return torch.stack([latent for one in made for latent in one.latents])


def answered(prompt: Sample, made: Generated) -> Sample:
    """The prompt with its answer, as far as it was fed."""
    fed, prefix = len(made.fed), len(prompt.input_ids)
    ids, onwards = torch.tensor(made.ids[:fed]), prompt.position_ids.max() + 1 + torch.arange(fed)
    return prompt._replace(
        input_ids=torch.cat([prompt.input_ids, ids]),
        labels=torch.cat([torch.full_like(prompt.input_ids, IGNORE), ids]),
        position_ids=torch.cat([prompt.position_ids, onwards.expand(3, -1)], dim=1),
        runs=tuple((prefix + start, k) for start, k in made.blocks()),
    )


def test_the_packed_forward_finds_the_states_that_decoding_had(gaussian: Path, mixed: Path) -> None:
    decoder = opened(gaussian, mixed)
    model, encoder = decoder.loaded.model, decoder.encoder
    prompts = [encoder.encode_prompt(scan(mixed)[0][row], row) for row in ROWS]
    made = decoded(decoder, prompts, list(range(len(ROWS))))
    rows = [answered(prompt, one) for prompt, one in zip(prompts, made, strict=True)]
    batch = decoder.tower.attach(collate(rows, 1, encoder.dummy(0)))
    fed, temperature = latents_of(made), 50.0
    with torch.no_grad():
        scores = model(batch._replace(fed=fed), Scoring(temperature, "gaussian"))
    wanted = [one.hidden[place] for one in made for place, kind in enumerate(one.fed) if kind == "H"]
    torch.testing.assert_close(scores.states, torch.stack(wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.latent_logp, gaussian_logp(fed, *model.latent_heads(scores.states)))
    # At each step's own state; the random head's logits are in the hundreds, and of ordinary size at this temperature.
    told = torch.cat([scores.logp[batch.target_sample == row] for row in range(len(rows))])
    steps = [(h, token) for one in made for h, token in zip(one.hidden, one.ids[: len(one.fed)], strict=False)]
    each = [torch.log_softmax(model.head.weight @ h / temperature, 0)[token] for h, token in steps]
    torch.testing.assert_close(told, torch.stack(each), rtol=0, atol=1e-5)


def test_an_evaluation_scores_the_mean_and_latents_that_are_drawn(gaussian: Path, mixed: Path) -> None:
    decoder = opened(gaussian, mixed)
    heads = decoder.loaded.model.latent_heads
    # Wide enough to change a token.
    heads.log_sigma.bias.data += 4
    spec = EvaluateSpec(data_path=mixed, task="boxed", max_new_tokens=TOKENS, batch_size=3)
    report = evaluate_file(decoder, spec)
    answers = report["answers"]
    texts = [[one["ids"], one["drawn"][0]["ids"]] for one in answers]
    assert any(own != drawn for own, drawn in texts)
    for part, of in ((report, [one["metrics"] for one in answers]),
                     (report["drawn"], [one["drawn"][0]["metrics"] for one in answers])):  # fmt: skip
        assert part["all"]["latents"] == pytest.approx(sum(one["latents"] for one in of) / len(answers))
    # What is drawn is the row's own, whoever answers it beside which others: here each by itself.
    (asked, _), limits = scan(mixed), run_limits(decoder, TOKENS, 8, "trained")
    tokens = latent_tokens(decoder.encoder)
    for row in (0, 3):
        sample = decoder.encoder.encode_prompt(asked[row], row)
        prompts = prompts_of(decoder.loaded.model, decoder.tower, decoder.encoder, [sample])
        draws = noise(seeds_of(42, row, 1))
        (alone,) = generate(decoder.loaded.model, prompts, tokens, limits, noise=draws)
        assert [alone.ids] == [texts[row][1]]
    # Several answers to a record each have their mean's and their drawn one; a model without heads has none of these.
    two = evaluate_file(decoder, spec.model_copy(update={"samples": 2, "decoding": "sampled", "most": 2}))
    assert [(len(one["samples"]), len(one["drawn"])) for one in two["answers"]] == [(2, 2)] * 2
    decoder.loaded.model.latent_heads = None
    plain = evaluate_file(decoder, spec.model_copy(update={"most": 2}))
    assert "drawn" not in plain
    assert "drawn" not in plain["answers"][0]


def test_an_export_takes_heads_that_were_not_trained_from_the_source(
    gaussian: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, checkpoint = opened(gaussian, mixed), tmp_path / "global_step1"
    model, encoder = decoder.loaded.model, decoder.encoder
    # DeepSpeed's file has what was trained.
    masters = {name: one.detach() for name, one in model.named_parameters() if "latent_heads" not in name}
    kept = {name: digest(one) for name, one in model.named_parameters() if name not in masters}
    assert len(kept) == 4
    checkpoint.mkdir()
    (checkpoint / STATE_FILE).write_text(json.dumps({"kept": kept}))
    monkeypatch.setattr(zero_to_fp32, "get_fp32_state_dict_from_zero_checkpoint", lambda *_, **__: masters)
    monkeypatch.setattr(export, "check_whole", lambda _: None)
    monkeypatch.setattr(export, "model_card", lambda _: "")
    base = read_base(gaussian, encoder.tokenizer)
    parts = Parts(base, encoder.tokenizer, encoder.images, gaussian, TRAINED)
    export_checkpoint(checkpoint, tmp_path / "made", torch.float32, parts)
    made, wanted = load_file(tmp_path / "made" / HEADS), load_file(gaussian / HEADS)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "made/config.json").read_text())["mirage"]["latent_heads"] == "gaussian"
    (checkpoint / STATE_FILE).write_text(json.dumps({"kept": dict.fromkeys(kept, "other")}))
    with pytest.raises(UserError, match=r"latent_heads\.\S+ in \S+ is not what \S+ was trained on"):
        export_checkpoint(checkpoint, tmp_path / "other", torch.float32, parts)
    (checkpoint / STATE_FILE).write_text(json.dumps({"kept": kept}))
    (tmp_path / "bare").mkdir()
    for file in gaussian.glob("*.*"):
        (tmp_path / "bare" / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"heads\.safetensors: no such file, and"):
        export_checkpoint(checkpoint, tmp_path / "other", torch.float32, parts._replace(source=tmp_path / "bare"))


# --------------------------------------------------------------------------------------------- which way gradients go


def test_vlpos_density_stands_around_what_a_model_with_heads_is_fed(gaussian: Path, mixed: Path) -> None:
    decoder = opened(gaussian, mixed)
    model, encoder = decoder.loaded.model, decoder.encoder
    prompts = [encoder.encode_prompt(scan(mixed)[0][row], row) for row in ROWS]
    # With no noise, as vlpo decodes.
    made = decoded(decoder, prompts, [])
    rows = [answered(prompt, one) for prompt, one in zip(prompts, made, strict=True)]
    batch: Any = decoder.tower.attach(collate(rows, 1, encoder.dummy(0)))
    weight, found = model.language_model.norm.weight.requires_grad_(), []
    for fed in (latents_of(made), 1.01 * latents_of(made)):
        scores = model(batch._replace(fed=fed), Scoring(1.0, "vlpo", 10.0))
        found.append(float(torch.autograd.grad(scores.latent_logp.sum(), weight)[0].abs().max()))
    # The first gradient of the latents is zero but for rounding; a shift of a hundredth is far from it.
    assert found[0] <= 1e-3 * found[1]


def test_the_gaussian_score_raises_the_probability_of_rewarded_latents() -> None:
    """By finite differences, of heads and of the states that they stand on."""
    torch.manual_seed(5)
    heads = LatentHeads(12, dtype=torch.float64)
    states = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    mean, log_sigma = heads(states)
    fed = (mean + log_sigma.exp() * torch.randn_like(mean)).detach()
    rewards = torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64)
    (gaussian_logp(fed, *heads(states)) * rewards).sum().backward()
    trained = [states, *heads.parameters()]
    with torch.no_grad():
        for moved in trained:
            # Central difference along the gradient: what the score promises is what the density does.
            rate, found = moved.grad.square().sum(), []
            step = 1e-4 * moved.grad / rate
            for sign in (1, -2):
                moved.add_(sign * step)
                found.append(float((gaussian_logp(fed, *heads(states)) * rewards).sum()))
            moved.add_(step)
            assert (found[0] - found[1]) / 2e-4 == pytest.approx(1.0, rel=1e-4)
        before = gaussian_logp(fed, *heads(states))
        for moved in trained:
            moved.add_(1e-5 * moved.grad)
        gained = gaussian_logp(fed, *heads(states)) - before
        assert float((gained * rewards).sum()) > 0
        assert float(gained[rewards > 0].mean()) > 0 > float(gained[rewards < 0].mean())


def test_vlpos_first_gradient_is_zero_and_its_ratio_never_above_one() -> None:
    """Its latents are the sampling policy's own states: no noise was drawn."""
    torch.manual_seed(6)
    states = torch.randn(6, 12, requires_grad=True)
    fed = states.detach().clone()
    old = vlpo_logp(fed, states, 10.0)
    old.sum().backward()
    assert float(states.grad.abs().max()) == 0
    later = vlpo_logp(fed, states + 0.3 * torch.randn_like(states), 10.0)
    assert float((later - old).max()) < 0
    # A true draw has a gradient at once.
    vlpo_logp(fed + 0.05 * torch.randn_like(fed), states, 10.0).sum().backward()
    assert float(states.grad.abs().min()) > 0

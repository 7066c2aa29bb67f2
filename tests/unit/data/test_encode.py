"""Encoding, against a slow encoder written here from facts of the public code, and transformers' own positions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder, load_tokenizer
from mirage_ds.data.record import Record, RecordError, make_record
from mirage_ds.data.sample import Sample
from mirage_ds.errors import UserError

EncoderFor = Callable[..., Encoder]

# Qwen/Qwen2.5-VL-7B-Instruct's chat_template.json (Apache-2.0).
PUBLIC_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)

IMAGE, HELPER = object(), object()
# name → (text_input, text_output, input images, helpers, the user turn's parts, the answer's parts)
ROWS: dict[str, tuple[Any, ...]] = {
    "mark in the middle": (
        "Here is <image> the map.\n\nGo!",
        "First left.<output_image>Then right. \\boxed{A}",
        ["w140x56.png"],
        ["w84x84.png"],
        ["Here is ", IMAGE, " the map.\n\nGo!"],
        ["First left.", HELPER, "Then right. \\boxed{A}"],
    ),
    "mark at the end": (
        "Look: <image>",
        "Here <output_image>",
        ["w100x61.png"],
        ["w56x84.png"],
        ["Look: ", IMAGE],
        ["Here ", HELPER],
    ),
    "two images, one helper, no mark": (
        "Which is it?",
        "The second.",
        ["w56x84.png", "w112x112.png"],
        ["w112x112.png"],
        [IMAGE, IMAGE, "Which is it?"],
        [HELPER, "The second."],
    ),
    "two marks, side by side and first": (
        "<image><image>7 12 x",
        "<output_image>a<output_image> b",
        ["w140x56.png", "w56x84.png"],
        ["w84x84.png", "w140x56.png"],
        [IMAGE, IMAGE, "7 12 x"],
        [HELPER, "a", HELPER, " b"],
    ),
    "no image": (
        "Just text",
        "  \n<output_image>\nYes.",
        [],
        ["w84x84.png"],
        ["Just text"],
        ["  \n", HELPER, "\nYes."],
    ),
    "no image, no latents": ("", "Ünïcode ✓ 3.14", [], [], [""], ["Ünïcode ✓ 3.14"]),
    "latents without a helper": ("q <image>", "a <output_image>", ["w84x84.png"], [], ["q ", IMAGE], ["a ", HELPER]),
}
STAGES = [(stage, k) for stage in ("sft", "stage1", "stage2") for k in (1, 4)]


def record_for(name: str) -> Record:
    text_input, text_output, images, helpers, _, _ = ROWS[name]
    row = {"text_input": text_input, "text_output": text_output, "image_input": images, "image_output": helpers}
    return make_record(json.dumps(row), 5)


def pixels_of(folder: Path, names: list[str], **limits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The public image processor's own output, one image at a time."""
    # Its defaults, in a copy: up to transformers 5.17 all processors share one, and `limits` would change it.
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    processor = Qwen2VLImageProcessorPil(size=size, **limits)
    made = [processor(images=[Image.open(folder / name).convert("RGB")], return_tensors="pt") for name in names]
    if not made:
        return torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64)
    return torch.cat([m["pixel_values"] for m in made]), torch.cat([m["image_grid_thw"] for m in made])


def slow_encode(
    tokenizer: Any, name: str, stage: str, k: int, grids: list[list[int]]
) -> tuple[list[int], list[int], Any]:
    """(ids, labels, runs) from pieces: every special token placed by its number, the text between them tokenized."""
    _, _, _, _, user, answer = ROWS[name]
    pieces: list[str | int] = []

    def put(piece: str | int) -> None:
        # Neighbouring texts are one text to the tokenizer.
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)

    number = tokenizer.get_vocab().__getitem__
    put(number("<|im_start|>")), put("system\nYou are a helpful assistant."), put(number("<|im_end|>"))
    put("\n"), put(number("<|im_start|>")), put("user\n")
    sizes = iter(grids)
    for part in user:
        if part is not IMAGE:
            put(part)
            continue
        _, height, width = next(sizes)
        put(number("<|vision_start|>"))
        for _ in range((height // 2) * (width // 2)):
            put(number("<|image_pad|>"))
        put(number("<|vision_end|>"))
    put(number("<|im_end|>")), put("\n"), put(number("<|im_start|>"))
    answer_piece = len(pieces)
    put("assistant\n")
    for part in answer:
        if part is not HELPER:
            put(part)
        elif stage != "sft":
            put(number("<|latent_start|>"))
            for _ in range(k):
                put(number("<|latent_pad|>"))
            put(number("<|latent_end|>"))
    put(number("<|im_end|>")), put("\n")
    ids: list[int] = []
    labels: list[int] = []
    runs = []
    for at, piece in enumerate(pieces):
        if isinstance(piece, int):
            if piece == number("<|latent_start|>"):
                runs.append((len(ids) + 1, k))
            ids.append(piece)
            labels.append(piece if at > answer_piece and piece != number("<|latent_pad|>") else -100)
            continue
        made = tokenizer(piece, add_special_tokens=False)["input_ids"]
        hidden = len(made) if at < answer_piece else 0
        while at == answer_piece and tokenizer.decode(made[:hidden]) != "assistant":
            hidden += 1
        ids += made
        labels += [-100] * hidden + made[hidden:]
    return ids, labels, tuple(runs)


@pytest.fixture(scope="module")
def reference(nano: Path) -> Qwen2_5_VLModel:
    with torch.device("meta"):
        return Qwen2_5_VLModel(AutoConfig.from_pretrained(nano))


@pytest.mark.parametrize(("stage", "k"), STAGES)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_slow_encoders_row(
    name: str, stage: str, k: int, encoder_for: EncoderFor, pictures: Path, reference: Qwen2_5_VLModel
) -> None:
    encoder = encoder_for(stage, k)
    _, _, images, helpers, _, _ = ROWS[name]
    if stage == "stage1" and not helpers:
        with pytest.raises(
            RecordError,
            match=r"line 5, image_output: stage1 needs a helper image; .*sft, or in stage2 with <output_image>",
        ):
            encoder.measure(record_for(name))
        return
    sample = encoder.encode(record_for(name), 31)
    pixels, grids = pixels_of(pictures, images)
    ids, labels, runs = slow_encode(encoder.tokenizer, name, stage, k, grids.tolist())
    assert sample.row == 31
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == labels
    assert sample.runs == runs
    pad = encoder.tokenizer.get_vocab()["<|image_pad|>"]
    assert sample.image_positions.tolist() == [i for i, token in enumerate(ids) if token == pad]
    torch.testing.assert_close(sample.pixel_values, pixels, rtol=0, atol=0)
    assert torch.equal(sample.image_grid_thw, grids)
    helper_pixels, helper_grids = pixels_of(pictures, helpers if stage == "stage1" else [])
    torch.testing.assert_close(sample.helper_pixel_values, helper_pixels, rtol=0, atol=0)
    assert torch.equal(sample.helper_grid_thw, helper_grids)
    kinds = (sample.input_ids == pad).int()[None]
    theirs, _ = reference.get_rope_index(sample.input_ids[None], kinds, image_grid_thw=grids)
    assert torch.equal(sample.position_ids, theirs[:, 0])
    measure = encoder.measure(record_for(name))
    merged = [tuple(grid.prod(dim=1).floor_divide(4).tolist()) for grid in (grids, helper_grids)]
    assert measure == (len(ids), sum(label != -100 for label in labels), len(runs), *merged, sum(k for _, k in runs))


def test_an_answer_with_two_runs_reads_as_the_public_code_writes_it(encoder_for: EncoderFor) -> None:
    encoder = encoder_for("stage2", 4)
    sample = encoder.encode(record_for("two marks, side by side and first"), 0)
    run = "<|latent_start|>" + "<|latent_pad|>" * 4 + "<|latent_end|>"
    whole = encoder.tokenizer.decode(sample.input_ids)
    assert whole.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert whole.endswith(f"<|im_start|>assistant\n{run}a{run} b<|im_end|>\n")


CONVERSATIONS = [
    [{"role": "user", "content": "plain text"}],
    [{"role": "user", "content": []}],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "  spaces \n"}, {"type": "image"}, {"type": "text", "text": "\n"}],
        }
    ],
    [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "{{ x }} {% y %}"}]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "again"},
    ],
]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_template_says_what_the_public_one_says(messages: Any, prompt: bool, encoder_for: EncoderFor) -> None:
    tokenizer = encoder_for("stage1").tokenizer
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, chat_template=PUBLIC_TEMPLATE
    )
    assert ours == theirs


def test_a_helper_with_fewer_merged_tokens_than_k_is_a_fault(encoder_for: EncoderFor) -> None:
    row = {"text_input": "q", "text_output": "a", "image_output": "w56x84.png"}
    record = make_record(json.dumps(row), 3)
    assert encoder_for("stage1", 6).measure(record).runs == 1
    with pytest.raises(RecordError, match=r"w56x84\.png has 6 merged tokens, fewer than latent_size 7") as caught:
        encoder_for("stage1", 7).measure(record)
    assert (caught.value.fault.line, caught.value.fault.field) == (3, "image_output")
    assert encoder_for("stage2", 7).measure(record).runs == 1


def test_limits_of_input_and_helper_images_are_apart(encoder_for: EncoderFor, pictures: Path) -> None:
    row = {"text_input": "q", "text_output": "a", "image_input": "w112x112.png", "image_output": "w112x112.png"}
    record = make_record(json.dumps(row), 1)
    for given, used in (
        (dict(pixels=(None, 6000)), (dict(max_pixels=6000), {})),
        (dict(helper_pixels=(None, 6000)), ({}, dict(max_pixels=6000))),
        (dict(pixels=(30000, None), helper_pixels=(50000, 90000)), (dict(min_pixels=30000), dict(min_pixels=50000))),
    ):
        sample = encoder_for("stage1", **given).encode(record, 0)
        for found, limits in ((sample.image_grid_thw, used[0]), (sample.helper_grid_thw, used[1])):
            assert torch.equal(found, pixels_of(pictures, ["w112x112.png"], **limits)[1]), given
    assert pixels_of(pictures, ["w112x112.png"], max_pixels=6000)[1].tolist() == [[1, 4, 4]]
    assert pixels_of(pictures, ["w112x112.png"])[1].tolist() == [[1, 8, 8]]


def test_a_smallest_size_above_the_largest_is_refused_with_its_flag(nano: Path) -> None:
    finder = ImageFinder(())
    with pytest.raises(UserError, match="--min_pixels 9000 is above --max_pixels 8000"):
        load_encoder([str(nano)], finder, "stage1", 4, pixels=(9000, 8000))
    with pytest.raises(UserError, match="--helper_min_pixels 9000 is above --helper_max_pixels 8000"):
        load_encoder([str(nano)], finder, "stage1", 4, helper_pixels=(9000, 8000))


def test_an_image_that_changed_since_it_was_measured_is_a_fault(
    encoder_for: EncoderFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (56, 84)).save(tmp_path / "i.png")
    encoder = encoder_for("stage2", beside=tmp_path / "rows.jsonl")
    record = make_record('{"text_input": "q", "text_output": "a", "image_input": "i.png"}', 2)
    monkeypatch.setattr(ImageFinder, "size", lambda *_: (112, 112))
    with pytest.raises(RecordError, match="line 2, image_input: an image changed its size"):
        encoder.encode(record, 0)


@pytest.mark.parametrize(("runs", "k"), [(0, 4), (1, 1), (2, 3)])
def test_the_dummy_row_has_its_runs_one_label_and_no_image(runs: int, k: int, encoder_for: EncoderFor) -> None:
    encoder = encoder_for("stage2", k)
    vocabulary = encoder.tokenizer.get_vocab()
    end, pad = vocabulary["<|endoftext|>"], vocabulary["<|latent_pad|>"]
    sample: Sample = encoder.dummy(runs)
    length = runs * k + 2
    assert sample.input_ids.tolist() == [end] + [pad] * (runs * k) + [end]
    assert sample.labels.tolist() == [-100] * (length - 1) + [end]
    assert sample.position_ids.tolist() == [list(range(length))] * 3
    assert sample.runs == tuple((1 + run * k, k) for run in range(runs))
    assert (sample.row, len(sample.image_positions)) == (-1, 0)
    for empty, width in (
        (sample.pixel_values, 1176),
        (sample.helper_pixel_values, 1176),
        (sample.image_grid_thw, 3),
        (sample.helper_grid_thw, 3),
    ):
        assert empty.shape == (0, width)


@pytest.fixture
def folder(nano: Path, tmp_path: Path) -> Path:
    """A copy of nano's tokenizer and image processor that a test may spoil."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(nano / name, tmp_path / name)
    return tmp_path


def spoil(folder: Path, *tokens: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for token in tokens:
            text = text.replace(token, token.replace("<|", "<|no_"))
        (folder / name).write_text(text)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_tokenizer_without_qwens_special_tokens_is_refused(token: str, folder: Path) -> None:
    spoil(folder, token)
    with pytest.raises(UserError) as caught:
        load_tokenizer([str(folder)], None)
    assert f"{folder}: the tokenizer lacks {token};" in str(caught.value)


def test_a_tokenizer_with_some_latent_tokens_only_is_refused(folder: Path) -> None:
    spoil(folder, "<|latent_end|>", "<|latent_pad|>")
    with pytest.raises(UserError, match=r"some of the latent tokens but not <\|latent_pad\|>, <\|latent_end\|>$"):
        load_tokenizer([str(folder)], None)


def test_a_tokenizer_without_latent_tokens_gets_them_at_its_end_in_the_public_order(folder: Path) -> None:
    spoil(folder, *LATENT_TOKENS)
    before = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load_tokenizer([str(folder)], None)
    names = ["<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [before, before + 1, before + 2]
    assert tokenizer("a<|latent_pad|>b")["input_ids"].count(before) == 1


def test_a_tokenizer_without_a_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer([str(folder)], None)


@pytest.mark.parametrize("part", ["tokenizer", "image processor"])
def test_a_folder_without_a_part_is_refused_and_a_later_folder_gives_it(part: str, folder: Path, nano: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json") if part == "tokenizer" else ("preprocessor_config.json",):
        (folder / name).unlink()
    with pytest.raises(UserError, match=f"no {part} .*copy the base model's files there"):
        load_encoder([str(folder)], ImageFinder(()), "stage1", 4)
    assert load_encoder([str(folder), str(nano)], ImageFinder(()), "stage1", 4).images.patch_size == 14


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_broken_part_is_one_sentence_that_names_the_folder(name: str, folder: Path) -> None:
    (folder / name).write_text('{"half": ')
    with pytest.raises(UserError, match=str(folder)):
        load_encoder([str(folder)], ImageFinder(()), "stage1", 4)


def test_the_public_image_processors_own_limits_are_kept(folder: Path) -> None:
    """Public Qwen2.5-VL folders state their limits as min_pixels and max_pixels."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    del values["size"]
    values |= dict(min_pixels=3136, max_pixels=12845056)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    encoder = load_encoder([str(folder)], ImageFinder(()), "stage1", 4, helper_pixels=(None, 9000))
    assert dict(encoder.images.size) == {"shortest_edge": 3136, "longest_edge": 12845056}
    assert dict(encoder.helpers.size) == {"shortest_edge": 3136, "longest_edge": 9000}

"""Whatever a user's file holds, it can be used or there is one sentence: never another exception, never a warning."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.indices import selected

from mirage_ds.cli import cli
from mirage_ds.config.flags import build_model, read_yaml
from mirage_ds.config.run import RunConfig
from mirage_ds.curate.check import check_file
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import MAX_PIXELS, ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record import MAX_DEPTH, Fault, Record, RecordError, make_record
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.engine.ds_config import read_json, resolve
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import Prediction, score
from mirage_ds.model.load import check_folder

# A fixture made once for all examples of a property is what is meant here.
once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
fewer = settings(once, max_examples=40)

GOOD = {"text_input": "Where? <image>", "text_output": "<output_image> There.", "image_input": "i.png"}
ASKED = dict(model="m", save_model_path="s", stage="stage2", data_path="d")

values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# Bytes of every kind: noise, and a good file in which a piece is lost, doubled or exchanged.
noise = st.binary(max_size=80)


def spoilt(good: bytes) -> Any:
    """Strategies of what may happen to a good file."""
    places = st.integers(0, len(good))
    return st.one_of(
        places.map(lambda at: good[:at]),
        st.tuples(places, places).map(lambda two: good[: min(two)] + good[max(two) :]),
        st.tuples(places, noise).map(lambda cut: good[: cut[0]] + cut[1] + good[cut[0] :]),
        st.tuples(places, noise).map(lambda cut: good[: cut[0]] + cut[1] + good[cut[0] + len(cut[1]) :]),
        noise,
        st.just(good.decode("latin-1").encode("utf-16")),
        st.just(b"\0" * len(good)),
    )


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """A Python warning is no way to tell a user something."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sentence(error: UserError, part: object = "") -> str:
    """Check that an error is one sentence that names `part`; return it."""
    text = str(error)
    assert 0 < len(text) < 2000
    assert str(part) in text
    return text


def checked(fault: Fault, line: int, field: str) -> Fault:
    """Check that a fault says where, what and how, and fits into a sentence."""
    assert (fault.line, fault.field) == (line, field)
    assert field
    assert fault.what
    assert fault.how
    assert len(str(fault)) < 12_000
    return fault


# ------------------------------------------------------------------------------------------------------------ records


def outcome(text: str, line: int = 4) -> Record | Fault:
    try:
        return make_record(text, line)
    except RecordError as error:
        return checked(error.fault, line, error.fault.field)


@once
@given(row=st.dictionaries(st.sampled_from(["text_input", "text_output", "image_input", "image_output", "n"]), values))
def test_a_row_of_any_types_is_a_record_or_a_fault_with_its_line_and_field(row: dict[str, Any]) -> None:
    made = outcome(json.dumps(GOOD | row))
    if isinstance(made, Record):
        # What it became, Arrow and every process can hold.
        json.dumps(made.extra, allow_nan=False)
        for text in (made.text_input, made.text_output, *made.image_input, *made.image_output):
            text.encode()
            assert isinstance(text, str)


@once
@given(content=spoilt((json.dumps(GOOD, ensure_ascii=False) + "\n").encode() * 3))
def test_a_file_of_any_bytes_is_records_faults_or_a_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    try:
        records, faults = scan(file)
    except UserError as error:
        sentence(error, file)
        return
    lines = [fault.line for fault in faults] + [record.line for record in records]
    assert len(lines) == len(set(lines)) > 0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"text_input": "q", "text_output": "a", "n": NaN}', "NaN is no JSON number"),
        ('{"text_input": "q", "text_output": "a", "n": [-Infinity]}', "-Infinity is no JSON number"),
        ('{"text_input": "q", "text_output": "a", "n": 1e999}', "the number '1e999' is too large"),
        ('{"text_input": "q", "text_output": "a", "n": ' + "9" * 5000 + "}", "a number of 5000 digits is too large"),
        ('{"text_input": "q", "text_input": "r", "text_output": "a"}', "key 'text_input' stands there twice"),
        ('{"text_input": "q", "text_output": "a", "n": {"k": 1, "k": 1}}', "key 'k' stands there twice"),
        ('{"text_input": "q", "text_output": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "levels of lists"),
        ('{"text_input": "q", "text_output": "a", "n": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", "levels of lists"),
        ('{"text_input": "q", "text_output": "a", "image_input": "a\\u0000b.png"}', "'a\\x00b.png' can be no path"),
        ('{"text_input": "q", "text_output": "a", "image_input": "\\udc80.png"}', "can be no path"),
        ('{"text_input": "q", "text_output": ' + json.dumps(["x" * 10_000]) + "}", "expected a string, found ['xxx"),
    ],
)
def test_what_json_loads_would_take_is_a_fault(text: str, what: str) -> None:
    fault = outcome(text)
    assert isinstance(fault, Fault)
    assert what in fault.what


def test_nesting_just_below_the_limit_is_kept() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert isinstance(outcome('{"text_input": "q", "text_output": "a", "n": ' + deep + "}"), Record)


def test_a_line_in_another_encoding_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = '{"text_input": "ä", "text_output": "a"}\n'.encode()
    file.write_bytes(b"\xef\xbb\xbf" + good * 500 + b'{"text_input": "q", "text_output": "caf\xe9"}\n' + good)
    records, faults = scan(file)
    assert len(records) == 501
    assert faults == [
        Fault(501, "json", "not UTF-8 text (byte 0xe9 at place 40 of the line)", "save the file as UTF-8")
    ]


def test_a_records_file_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path, tmp_path / "a", tmp_path / "z\0z", tmp_path / ("n" * 400)):
        with pytest.raises(UserError) as caught:
            scan(path)
        sentence(caught.value)


# ------------------------------------------------------------------------------------------------------------- images


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header promises a picture of that size."""
    made = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ):
        made += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return made


def opened(folder: Path, name: str) -> Image.Image | Fault:
    """What the trainer makes of an image: its size from the header, then the picture."""
    finder, record = ImageFinder((folder,)), Record(6, "q", "a", (name,), ())
    try:
        height, width = finder.size(record, "image_input", name)
        made = finder.load(record, "image_input", name)
    except RecordError as error:
        return checked(error.fault, 6, "image_input")
    assert (made.mode, made.size) == ("RGB", (width, height))
    return made


def _saved(tmp: Path, image: Image.Image, name: str, **options: Any) -> bytes:
    image.save(tmp / name, **options)
    return (tmp / name).read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small good images of every format."""
    tmp = tmp_path_factory.mktemp("formats")
    image = Image.effect_noise((20, 14), 90).convert("RGB")
    more = dict(save_all=True, append_images=[image.rotate(180)])
    return {
        "png": _saved(tmp, image, "i.png"),
        "palette.png": _saved(tmp, image.quantize(16), "p.png", transparency=bytes([0, 128])),
        "16.png": _saved(tmp, Image.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20) * 200), "s.png"),
        "jpg": _saved(tmp, image, "i.jpg"),
        "cmyk.jpg": _saved(tmp, image.convert("CMYK"), "c.jpg"),
        "gif": _saved(tmp, image, "i.gif", **more),
        "webp": _saved(tmp, image, "i.webp", **more),
        "apng": _saved(tmp, image, "a.png", **more),
        "tiff": _saved(tmp, image, "i.tiff", compression="tiff_lzw"),
        "bmp": _saved(tmp, image, "i.bmp"),
        "ico": _saved(tmp, image.resize((16, 16)), "i.ico"),
        "ppm": _saved(tmp, image, "i.ppm"),
    }


KINDS = ["png", "palette.png", "16.png", "jpg", "cmyk.jpg", "gif", "webp", "apng", "tiff", "bmp", "ico", "ppm"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_works_whatever_its_extension(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("i.png", "i.txt"):
        (tmp_path / name).write_bytes(files[kind])
        made = opened(tmp_path, name)
        assert isinstance(made, Image.Image), made


@pytest.mark.parametrize("kind", KINDS)
@fewer
@given(data=st.data())
def test_a_spoilt_image_is_a_picture_or_a_fault(
    kind: str, data: st.DataObject, files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "i.png").write_bytes(data.draw(spoilt(files[kind])))
    with warnings.catch_warnings():
        # Of a spoilt file Pillow may say more than that it is spoilt; bombs are not meant.
        warnings.simplefilter("ignore")
        opened(tmp_path, "i.png")


@pytest.mark.parametrize("kind", ["gif", "webp", "apng"])
def test_of_an_animation_the_first_picture_is_taken(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(files[kind])
    (tmp_path / "still.png").write_bytes(files["png"])
    made, still = opened(tmp_path, "i.png"), opened(tmp_path, "still.png")
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(still)).mean() < 20
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(still.rotate(180))).mean() > 20


def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "i.png")
    made = np.asarray(opened(tmp_path, "i.png"))
    assert (made == (np.arange(256).reshape(16, 16, 1))).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_a_channel_are_a_fault_since_nobody_knows_their_range(dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(np.ones((9, 9), dtype=dtype)).save(tmp_path / "i.tiff")
    fault = opened(tmp_path, "i.tiff")
    assert "has 32 bits a channel" in fault.what


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 20_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1), (9460, 9460)]
)
def test_a_decompression_bomb_is_a_fault_and_nothing_is_allocated(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(width, height))
    assert width * height > MAX_PIXELS
    started = time.process_time()
    fault = opened(tmp_path, "i.png")
    assert time.process_time() - started < 1
    assert fault.what == f"image {tmp_path / 'i.png'} has more than 89,478,485 pixels"


def test_below_the_limit_pillow_is_asked(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(9459, 9459))
    finder = ImageFinder((tmp_path,))
    assert finder.size(Record(1, "q", "a", ("i.png",), ()), "image_input", "i.png") == (9459, 9459)


def test_data_check_says_a_bomb_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(10_000, 10_000))
    rows = [{"text_input": "q", "text_output": "a", "image_input": "i.png"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = "from mirage_ds.cli import main; main()"
    command = [sys.executable, "-W", "always", "-c", start, "data", "check", tmp_path / "rows.jsonl", "--stage", "sft"]
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([*map(str, command)], env=wide, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Warning" not in done.stderr + done.stdout
    assert "3 fault(s) in 3 records" in " ".join(done.stdout.split())


def test_images_opened_in_threads_leave_the_warnings_filters_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(10_000, 10_000))
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: opened(tmp_path, "i.png"), range(400)))
    finally:
        sys.setswitchinterval(interval)
    assert all("has more than 89,478,485 pixels" in fault.what for fault in found)
    assert list(warnings.filters) == before


def test_what_is_no_file_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path / "b.png", tmp_path / "a.png")
    os.symlink(tmp_path / "a.png", tmp_path / "b.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "a.png", "pipe.png", "gone.png", "z\0z.png", "n" * 5000, "a/" * 3000):
        assert isinstance(opened(tmp_path, name), Fault)
    Image.new("RGB", (9, 9)).save(tmp_path / "i.png")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # The suite may run as root, whom no mode stops.
    monkeypatch.setattr(Image, "open", refuse)
    assert opened(tmp_path, "i.png").what == f"image {tmp_path / 'i.png'} cannot be read (Permission denied)"
    monkeypatch.setattr(Path, "is_file", refuse)
    assert opened(tmp_path, "i.png").what == "'i.png' cannot be looked for (Permission denied)"
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be read \(Permission denied\)"):
        scan(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_an_image_of_one_pixel_is_a_sample(
    width: int, height: int, encoder_for: Callable[..., Encoder], tmp_path: Path
) -> None:
    Image.new("RGB", (width, height), (9, 9, 9)).save(tmp_path / "i.png")
    row = GOOD | {"image_output": "i.png"}
    sample = encoder_for("stage1", 2, beside=tmp_path / "rows.jsonl").encode(make_record(json.dumps(row), 1), 0)
    assert isinstance(sample, Sample)
    assert len(sample.image_positions) == int(sample.image_grid_thw.prod()) // 4 > 0
    assert bool(torch.isfinite(sample.pixel_values).all())


# ------------------------------------------------------------------------------------------------------ confined paths


def test_confined_paths_stay_in_the_folder_and_under_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data/sub", "root", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/sub/in.png", "root/r.png", "other/o.png"):
        Image.new("RGB", (30, 40)).save(tmp_path / name)
    os.symlink(tmp_path / "other/o.png", tmp_path / "data/link.png")
    os.symlink(tmp_path / "other", tmp_path / "data/linked")
    os.symlink(tmp_path / "data/sub", tmp_path / "data/inner")
    monkeypatch.chdir(tmp_path / "other")
    confined = ImageFinder.beside(tmp_path / "data/rows.jsonl", tmp_path / "root", confine=True)
    free = ImageFinder.beside(tmp_path / "data/rows.jsonl", tmp_path / "root")
    record = Record(3, "q", "a", (), ())
    good = ["sub/in.png", "inner/in.png", "r.png", "../data/sub/in.png", str(tmp_path / "root/r.png")]
    for path in good:
        assert confined.find(record, "image_input", path).is_file()
    for path in ["link.png", "linked/o.png", "../other/o.png", str(tmp_path / "other/o.png"), "o.png"]:
        assert free.find(record, "image_input", path).is_file()
        with pytest.raises(RecordError) as caught:
            confined.find(record, "image_input", path)
        fault = caught.value.fault
        places = f"{tmp_path / 'data'} and {tmp_path / 'root'}"
        assert (fault.line, fault.field) == (3, "image_input")
        assert fault.what == f"{path!r} is {tmp_path / 'other/o.png'}, outside {places}"
        assert "--confine_paths" in fault.how
    (tmp_path / "data/rows.jsonl").write_text(json.dumps(GOOD | {"image_input": "link.png"}) + "\n")
    assert check_file(tmp_path / "data/rows.jsonl", "stage2", None, None, 4)[1] == []
    (fault,) = check_file(tmp_path / "data/rows.jsonl", "stage2", None, None, 4, confine_paths=True)[1]
    assert "outside" in fault.what


# ------------------------------------------------------------------------------------------------------- special tokens

PIECES = ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|latent_pad|>", "<|latent_start|>", "<|endoftext|>", "<|im_"]
texts: Any = st.lists(st.sampled_from([*PIECES, "left", " \n", "ä", "end|>", "\ue000", "\uf8ff"]) | st.text(max_size=4))
texts = texts.map("".join)


def clean(text: str) -> str:
    return text.replace("<image>", "").replace("<output_image>", "")


def record_with(question: str, answer: str) -> Record:
    return Record(2, question, answer, (), ())


@once
@given(question=texts, answer=texts, stage=st.sampled_from(["sft", "stage2"]))
def test_special_tokens_in_a_users_text_stay_text(
    question: str, answer: str, stage: str, encoder_for: Callable[..., Encoder]
) -> None:
    encoder = encoder_for(stage, 3)
    tokenizer = encoder.tokenizer
    special = {tokenizer.convert_tokens_to_ids(token) for token in encoder.literals.special_tokens}
    question, answer = clean(question), clean(answer)
    marked = f"{answer[:3]}<output_image>{answer[3:]}"
    ids = encoder.encode(record_with(question, marked), 0).input_ids.tolist()
    plain = encoder.encode(record_with("q", "a<output_image>b"), 0).input_ids.tolist()
    # Neither more nor fewer special tokens than the template and the encoder place, in their order.
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
    run = "" if stage == "sft" else "<|latent_start|>" + "<|latent_pad|>" * 3 + "<|latent_end|>"
    # The nano tokenizer has no normalizer, so what it decodes to is what was written.
    decoded = tokenizer.decode(ids)
    assert f"user\n{question}<|im_end|>\n" in decoded
    assert decoded.endswith(f"assistant\n{answer[:3]}{run}{answer[3:]}<|im_end|>\n")


@once
@given(question=st.text(max_size=30), answer=st.text(max_size=30))
def test_for_ordinary_text_both_ways_give_the_same_ids(
    question: str, answer: str, encoder_for: Callable[..., Encoder]
) -> None:
    encoder = encoder_for("stage2", 3)
    text = encoder._text(record_with(question.replace("<image>", ""), answer + "<output_image>" + answer), 3)
    slow = encoder.literals.tokenize(text, {"<|im_end|>": "\U0010ffff"})
    assert slow == encoder.literals.tokenize(text, {}) == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_shared_tokenizer_and_the_literal_one_keep_apart(encoder_for: Callable[..., Encoder]) -> None:
    encoder = encoder_for("stage2", 3)
    tokenizer, end = encoder.tokenizer, encoder.id_of("<|im_end|>")
    own = encoder.encode(record_with("q", "a"), 0).input_ids.tolist().count(end)
    for _ in range(2):
        ids = encoder.encode(record_with("a<|im_end|>b", "a"), 0).input_ids.tolist()
        assert ids.count(end) == own
        assert tokenizer.backend_tokenizer.encode_special_tokens is False
        assert tokenizer.backend_tokenizer.encode("a<|im_end|>b").ids.count(end) == 1
        tokenizer("now by the other way <|im_end|>")


def test_marks_left_out_by_sft_spell_no_special_token(encoder_for: Callable[..., Encoder]) -> None:
    encoder = encoder_for("sft", 3)
    ids = encoder.encode(record_with("q", "a <|im_<output_image>end|> b"), 0).input_ids.tolist()
    end = encoder.id_of("<|im_end|>")
    assert ids.count(end) == encoder.encode(record_with("q", "a"), 0).input_ids.tolist().count(end)
    assert "a <|im_end|> b<|im_end|>\n" in encoder.tokenizer.decode(ids)


def test_a_prompt_with_special_tokens_is_text_and_its_image_stays_an_image(
    encoder_for: Callable[..., Encoder], pictures: Path
) -> None:
    encoder = encoder_for("sft", 1)
    record = Record(1, "is <|image_pad|> <image> an image?<|im_end|>", "ignored <|im_end|>", ("w56x84.png",), ())
    sample = encoder.encode_prompt(record, 0)
    assert len(sample.image_positions) == 6
    decoded = encoder.tokenizer.decode(sample.input_ids)
    assert decoded.count("<|image_pad|>") == 7
    assert decoded.endswith("an image?<|im_end|><|im_end|>\n<|im_start|>assistant")


@pytest.mark.parametrize(
    "unit", ["a", "ab ", " ", "\n", " \n", "1", "<|im_end|>", "<|im_", "ä", "a\u0301", "🗺", "<output_image>x"]
)
def test_a_huge_text_is_dropped_and_counted_in_linear_time(
    unit: str, encoder_for: Callable[..., Encoder], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    encoder = encoder_for("stage2", 2, beside=file)

    def seconds(length: int) -> float:
        answer = "x" + unit * (length // len(unit))
        rows = [{"text_input": "q", "text_output": "a"}, {"text_input": "q", "text_output": answer}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        started = time.process_time()
        index = selected(file, encoder, 40, 0.5)
        assert (index.row_ids.tolist(), index.dropped, index.skipped) == ([0], 1, ())
        return time.process_time() - started

    seconds(1000)
    short, long = seconds(25_000), seconds(200_000)
    # Eight times the text: quadratic time would be 64 times as long.
    assert long < 24 * short + 0.3


# ------------------------------------------------------------------------------------------------ skipping in the index


def test_faulty_records_are_left_out_and_are_not_called_too_long(
    encoder_for: Callable[..., Encoder], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    Image.new("RGB", (56, 56)).save(tmp_path / "i.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "i.png").read_bytes()[:60])
    good, long = {"text_input": "q", "text_output": "a"}, {"text_input": "q", "text_output": "long " * 200}
    rows = [good, "{", good | {"image_input": "gone.png"}, good | {"image_input": "cut.png"}, long, good]
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    encoder = encoder_for("stage2", 2, beside=file)
    index = selected(file, encoder, 100, 0.4, max_bad_share=0.5)
    assert [fault.line for fault in index.skipped] == [2, 3, 4]
    assert (index.row_ids.tolist(), index.dropped, len(index.rows)) == ([0, 5], 1, 6)
    assert index.dropped_share == 1 / 3
    assert (index.tokens > 0).all()
    with pytest.raises(
        UserError, match=r"3 of 6 records have a fault, above --max_bad_share 0.49; the first is line 2"
    ):
        selected(file, encoder, 100, 0.4, max_bad_share=0.49)
    with pytest.raises(UserError, match=r"rows.jsonl: line 2, json: .* \(and 2 more"):
        selected(file, encoder, 100, 0.4)
    file.write_text("{\n{\n")
    with pytest.raises(UserError, match="no usable row: 2 record"):
        selected(file, encoder, 100, 0.4, max_bad_share=1)


# ------------------------------------------------------------------------------------------------------------ settings


@once
@given(row=st.dictionaries(st.sampled_from(list(RunConfig.model_fields)) | st.text(max_size=9), values, max_size=4))
def test_settings_of_any_type_are_a_run_or_a_sentence(row: dict[str, Any]) -> None:
    try:
        config = build_model(RunConfig, {}, ASKED | row)
    except UserError as error:
        sentence(error)
        return
    assert isinstance(config, RunConfig)
    config.model_dump_json()


@once
@given(content=spoilt(yaml.safe_dump(ASKED | dict(epochs=3, report_to=["none"])).encode()))
def test_a_yaml_of_any_bytes_is_settings_or_a_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    try:
        build_model(RunConfig, {}, read_yaml(file))
    except UserError as error:
        sentence(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 3\nepochs: 4\n", "line 2: not valid YAML (key 'epochs' stands there twice)"),
        ("when: 2001-99-99\n", "cannot be read (month must be in 1..12)"),
        ("epochs: !!int x\n", "cannot be read ("),
        ("epochs: !!timestamp x\n", "cannot be read ("),
        ("epochs: !!bool x\n", "cannot be read ("),
        ("a: " + "[" * 5000, "cannot be read (RecursionError"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
    ],
)
def test_odd_yaml_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "run.yaml")
    assert said in str(caught.value)
    assert str(tmp_path / "run.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"epochs": math.nan}, "'epochs' in the YAML is nan"),
        ({"learning_rate": math.inf}, "'learning_rate' in the YAML is inf"),
        ({"save_model_path": "a\0b"}, "zero byte"),
        ({"model": "a\0b"}, "zero byte"),
        ({"latent_size": 10**12}, "--latent_size 1000000000000 is above --max_length 4096"),
        ({"max_bad_share": 1.5}, "'max_bad_share' in the YAML is 1.5"),
        ({"stage": "x" * 10_000}, "'stage' in the YAML is 'xxx"),
    ],
)
def test_odd_settings_are_one_sentence(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(RunConfig, {}, ASKED | row)
    assert said in sentence(caught.value)


def test_a_fault_refuses_unless_asked_to_skip() -> None:
    assert RunConfig(**ASKED, max_bad_share=0.5).tolerated_share is None
    assert RunConfig(**ASKED, skip_bad_records=True).tolerated_share == 0.01


# ----------------------------------------------------------------------------------------------------------- decoding


def test_a_prompt_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--prompt: not UTF-8 text"):
        cli.main(["generate", str(tmp_path), "--prompt", "caf\udce9"], standalone_mode=False)


@pytest.mark.parametrize("board", [None, 3, "map", {}, [], [[1]], [1, "x"], True, [[3, 0], [0, 2]]])
@pytest.mark.parametrize("task", ["vsp-spatial-planning", "vsp-spatial-reasoning"])
def test_a_board_of_any_type_is_scored_or_a_sentence(task: str, board: Any) -> None:
    record = Record(1, "q", "\\boxed{A}", (), (), {"map_desc": board})
    try:
        scores = score([record], [Prediction("\\boxed{RIGHT}", [], [])], task)
    except UserError as error:
        sentence(error)
        return
    assert scores["all"]["count"] == 1


# ------------------------------------------------------------------------------------------------------ DeepSpeed JSONs

STAGE = b'{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}, "bf16": {"enabled": true}}'


def deepspeed_outcome(file: Path) -> None:
    try:
        resolve(read_json(file), file, RunConfig(**ASKED), 2)
    except UserError as error:
        sentence(error, file)


@once
@given(content=spoilt(STAGE))
def test_a_deepspeed_json_of_any_bytes_is_read_or_a_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(content)
    deepspeed_outcome(file)


KEYS = [
    "zero_optimization",
    "optimizer",
    "bf16",
    "fp16",
    "train_batch_size",
    "gradient_clipping",
    "scheduler",
    "tensorboard",
]


@once
@given(row=st.dictionaries(st.sampled_from(KEYS), values | st.dictionaries(st.sampled_from(
    ["stage", "offload_optimizer", "params", "type", "enabled", "device", "lr"]), values)))  # fmt: skip
def test_a_deepspeed_json_of_any_types_is_read_or_a_sentence(row: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(row))
    deepspeed_outcome(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"gradient_clipping": NaN}', "NaN is no JSON number"),
        ('{"gradient_clipping": -Infinity}', "-Infinity is no JSON number"),
        ('{"gradient_clipping": 1e400}', "too large"),
        ('{"tensorboard": ' + "[" * 100_000 + "]" * 100_000 + "}", "RecursionError"),
        ('{"zero_optimization": {"stage": true}}', "'zero_optimization.stage' is True"),
        ('{"zero_optimization": {"stage": 3.0}}', "'zero_optimization.stage' is 3.0"),
    ],
)
def test_odd_deepspeed_json_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "ds.json")
    assert said in sentence(caught.value)


# -------------------------------------------------------------------------------------------------------- model folders

PARTS = ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"]


def folder_outcome(folder: Path) -> None:
    finder = ImageFinder((folder,))
    try:
        check_folder(folder)
        encoder = load_encoder([str(folder)], finder, "stage2", 2)
        encoder.encode(record_with("q", "a"), 0)
    except UserError as error:
        sentence(error, folder)


@pytest.mark.parametrize("part", PARTS)
@settings(once, max_examples=12)
@given(data=st.data())
def test_a_model_folder_with_a_spoilt_part_works_or_is_a_sentence(
    part: str, data: st.DataObject, nano: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano, folder, dirs_exist_ok=True)
    good = (nano / part).read_bytes()
    (folder / part).write_bytes(data.draw(spoilt(good)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder_outcome(folder)


@pytest.mark.parametrize("part", [part for part in PARTS if part.endswith("json")])
@pytest.mark.parametrize("content", ["[]", "{}", "3", "null", '"x"', "[{}]", "{" * 3000, '{"a": NaN}', "\0"])
def test_a_model_folder_with_a_part_of_another_type_works_or_is_a_sentence(
    part: str, content: str, nano: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano, folder)
    (folder / part).write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder_outcome(folder)


@pytest.mark.parametrize("wrong", [None, "x", [], {}, 0, -1, 1.5])
@pytest.mark.parametrize(
    ("block", "key"),
    [
        (None, "text_config"),
        (None, "vision_config"),
        (None, "dtype"),
        ("text_config", "hidden_size"),
        ("text_config", "rope_parameters"),
        ("vision_config", "num_heads"),
    ],
)
def test_a_model_configuration_with_a_wrong_value_works_or_is_a_sentence(
    block: str | None, key: str, wrong: Any, nano: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano, folder)
    content = json.loads((nano / "config.json").read_text())
    (content[block] if block else content)[key] = wrong
    (folder / "config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder_outcome(folder)


@pytest.mark.parametrize(
    "template", ["", "fixed", "{{ messages[0]['content'][0]['text'] }}", "<|image_pad|>", "{{ 1/0 }}"]
)
def test_a_template_that_loses_the_question_or_its_image_is_a_sentence(
    template: str, nano: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano, folder)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"chat[ _]template"):
        load_encoder([str(folder)], ImageFinder(()), "stage2", 2)

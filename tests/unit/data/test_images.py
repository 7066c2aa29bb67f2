"""Pictures of every kind come as viewers show them; Pillow and transformers are the oracles. And where they stand."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from transformers.image_utils import load_image

from mirage_ds.curate.importing import import_records
from mirage_ds.curate.spec import ImportSpec
from mirage_ds.data import images
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.inside import content_of
from mirage_ds.data.record import Fault, Record, RecordError, make_record
from mirage_ds.data.record_files import read_piece
from mirage_ds.data.sources import pieces
from mirage_ds.errors import Stopped

RECORD = Record(7, "q", "a", (), ())
ORIENTATION = 0x0112


def seen(place: Path) -> np.ndarray:
    """What is trained on; its size is what the header was taken for."""
    finder = ImageFinder((place.parent,))
    made = finder.load(RECORD, "image_input", place.name)
    assert (made.mode, made.size[::-1]) == ("RGB", finder.size(RECORD, "image_input", place.name))
    return np.asarray(made)


def noise(mode: str = "RGB", size: tuple[int, int] = (21, 13)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(channels).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def exif(turn: Any) -> bytes:
    made = Image.Exif()
    made[ORIENTATION] = turn
    return made.tobytes()


# ---------------------------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
def test_photographs_stand_upright(kind: str, turn: int, tmp_path: Path) -> None:
    place = tmp_path / f"i.{kind}"
    noise().save(place, exif=exif(turn))
    with Image.open(place) as image:
        turned = ImageOps.exif_transpose(image)
    assert (turned.size == (13, 21)) == (turn >= 5)
    assert (seen(place) == np.asarray(turned.convert("RGB"))).all()
    assert (seen(place) == np.asarray(load_image(str(place)))).all()


def chunked(place: Path, kind: bytes, content: bytes, behind: bool) -> None:
    """Write a chunk into a PNG, in front of its pixels or behind them."""
    whole = place.read_bytes()
    at = len(whole) - 12 if behind else whole.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    place.write_bytes(whole[:at] + chunk + whole[at:])


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PROFILE = f"\nexif\n{len(exif(6)):8}\n{exif(6).hex()}\n"


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"eXIf", exif(6).removeprefix(b"Exif\0\0")),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()),
        (b"tEXt", b"Raw profile type exif\0" + PROFILE.encode()),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE.encode())),
    ],
    ids=["exif", "xmp", "text", "compressed"],
)
def test_a_png_says_its_turn_before_or_behind_its_pixels(
    kind: bytes, content: bytes, behind: bool, tmp_path: Path
) -> None:
    place = tmp_path / "i.png"
    noise().save(place)
    chunked(place, kind, content, behind)
    assert (seen(place) == np.asarray(noise().transpose(Image.Transpose.ROTATE_270))).all()


def test_the_size_of_a_png_is_told_without_reading_or_decoding_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stored as they are, the pixels spell the name of a note.
    place, pixels = tmp_path / "i.png", b"".join(b"\0" + b"tEXt" * 4 for _ in range(16))
    place.write_bytes(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 0)), (b"IEND", b"")):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        place.write_bytes(place.read_bytes() + chunk)

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", never)
    monkeypatch.setattr(Path, "read_bytes", never)
    assert ImageFinder((tmp_path,)).size(RECORD, "image_input", place.name) == (16, 16)


def test_a_broken_picture_that_many_rows_show_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, place, finder = io.BytesIO(), tmp_path / "i.jpg", ImageFinder((tmp_path,))
    noise(size=(200, 200)).save(whole, "jpeg")
    place.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    looks: list[int] = []
    decode = images.upright_rgb

    def counted(image: Image.Image) -> Image.Image | None:
        looks.append(1)
        return decode(image)

    monkeypatch.setattr(images, "upright_rgb", counted)
    said = set()
    for line in (3, 4, 5):
        with pytest.raises(RecordError, match=r"cannot be decoded .* replace the file") as caught:
            finder.check(replace(RECORD, line=line), "image_input", place.name)
        said.add(caught.value.fault.line)
    assert (said, len(looks)) == ({3, 4, 5}, 1)
    # Corrected, it is looked at again.
    place.write_bytes(whole.getvalue())
    finder.check(RECORD, "image_input", place.name)


@pytest.mark.parametrize(
    "spoilt", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", exif(6)[:12], exif(0), exif(9)]
)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_picture_with_spoilt_exif_is_taken_as_it_lies(kind: str, spoilt: bytes, tmp_path: Path) -> None:
    plain, place = tmp_path / f"plain.{kind}", tmp_path / f"i.{kind}"
    noise().save(plain)
    noise().save(place, exif=spoilt)
    assert (seen(place) == seen(plain)).all()


# --------------------------------------------------------------------------------------------------------- transparency


def on_white(image: Image.Image) -> np.ndarray:
    """Composite by hand, in the exact numbers."""
    values = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def palette(mode: str) -> Image.Image:
    made = noise("L").point(lambda value: value % 4).convert("L")
    image = Image.frombytes("P", made.size, made.tobytes())
    image.putpalette([0, 0, 0, 250, 20, 30, 10, 200, 30, 9, 9, 240])
    return image.convert(mode)


TRANSPARENT: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "RGBA": (noise("RGBA"), "png", {}),
    "RGBA webp": (noise("RGBA"), "webp", dict(lossless=True, exact=True)),
    "RGBA tiff": (noise("RGBA"), "tif", {}),
    "LA": (noise("LA"), "png", {}),
    "LA tiff": (noise("LA"), "tif", {}),
    "P, one shade": (palette("P"), "png", dict(transparency=2)),
    "P, alpha of each": (palette("P"), "png", dict(transparency=bytes([0, 128, 255, 3]))),
    "P gif": (palette("P"), "gif", dict(transparency=1)),
    "RGB, one colour": (palette("RGB"), "png", dict(transparency=(10, 200, 30))),
    "L, one shade": (palette("P").convert("L"), "png", dict(transparency=0)),
    "1, one shade": (noise("L").convert("1", dither=Image.Dither.NONE), "png", dict(transparency=255)),
    "RGBA, turned": (noise("RGBA"), "png", dict(exif=exif(6))),
    "P, turned": (palette("P"), "png", dict(transparency=0, exif=exif(8))),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_white(kind: str, tmp_path: Path) -> None:
    image, suffix, options = TRANSPARENT[kind]
    place = tmp_path / f"i.{suffix}"
    image.save(place, **options)
    with Image.open(place) as opened:
        assert opened.has_transparency_data
        wanted = on_white(ImageOps.exif_transpose(opened))
    assert np.abs(seen(place) - wanted).max() <= 0.51
    assert (wanted.min(axis=-1) > 254).any()
    assert wanted.min() < 130
    # As qwen-vl-utils has it.
    layer = ImageOps.exif_transpose(Image.open(place)).convert("RGBA")
    white = Image.new("RGB", layer.size, (255, 255, 255))
    white.paste(layer, mask=layer.split()[3])
    assert (seen(place) == np.asarray(white)).all()


def png(values: np.ndarray, bits: int, colour: int, transparent: bytes) -> bytes:
    """A PNG of samples that Pillow does not write; `values` are rows of bytes as they lie in the file."""
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    side = len(values)
    made = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        made += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return made


def test_transparent_shades_of_2_4_and_16_bits(tmp_path: Path) -> None:
    place = tmp_path / "i.png"
    # Two rows of two samples: of 4 bits 0 and 10, 10 and 15.
    place.write_bytes(png(np.array([[0x0A], [0xAF]], dtype=np.uint8), 4, 0, struct.pack(">H", 10)))
    assert seen(place)[..., 0].tolist() == [[0, 255], [255, 255]]
    chunked(place, b"tEXt", b"Comment\0behind the pixels", behind=True)
    assert seen(place)[..., 0].tolist() == [[0, 255], [255, 255]]
    place.write_bytes(png(np.array([[0b00010000], [0b10110000]], dtype=np.uint8), 2, 0, struct.pack(">H", 1)))
    assert seen(place)[..., 0].tolist() == [[0, 255], [170, 255]]
    grey = np.array([[5, 260], [261, 60_000]], dtype=">u2")
    place.write_bytes(png(grey.view(np.uint8).reshape(2, 4), 16, 0, struct.pack(">H", 260)))
    assert seen(place)[..., 0].tolist() == [[0, 255], [1, 234]]
    colours = np.array([[5, 6, 7, 40_000, 300, 900], [1, 2, 60_000, 0, 0, 0]], dtype=">u2")
    place.write_bytes(png(colours.view(np.uint8).reshape(2, 12), 16, 2, struct.pack(">HHH", 40_000, 300, 900)))
    assert seen(place).tolist() == [[[0, 0, 0], [255, 255, 255]], [[0, 0, 234], [0, 0, 0]]]


# ---------------------------------------------------------------------------------------------------------- other modes


def test_grey_of_more_than_8_bits_keeps_its_upper_bits(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 77
    wanted = np.arange(256).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "i.png")
    Image.fromarray(ramp).save(tmp_path / "i.tif")
    Image.fromarray(ramp).save(tmp_path / "packed.tif", compression="tiff_lzw")
    Image.fromarray(65535 - ramp).save(tmp_path / "white.tif", tiffinfo={262: 0})
    (tmp_path / "i.pgm").write_bytes(b"P5\n16 16\n65535\n" + ramp.astype(">u2").tobytes())
    (tmp_path / "plain.pgm").write_text("P2\n16 16\n65535\n" + " ".join(map(str, ramp.reshape(-1).tolist())))
    # Of 12 bits: Pillow scales them to 16.
    (tmp_path / "twelve.pgm").write_bytes(b"P5\n16 16\n4095\n" + (ramp >> 4).astype(">u2").tobytes())
    for name in ("i.png", "i.tif", "packed.tif", "white.tif", "i.pgm", "plain.pgm", "twelve.pgm"):
        made = seen(tmp_path / name)
        assert (made == made[..., :1]).all(), name
        assert np.abs(made[..., 0] - wanted).max() == 0, name


def test_a_tiff_of_12_bits_is_no_black_picture(tmp_path: Path) -> None:
    values = np.arange(0, 4096, 16).reshape(16, 16)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    content = packed.astype(np.uint8).tobytes()
    tags = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, len(content))]
    folder = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "i.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content + folder + bytes(4))
    assert seen(tmp_path / "i.tif")[..., 1].tolist() == (values >> 4).tolist()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("1", "tif"), ("L", "png"), ("P", "png"), ("P", "gif"), ("P", "bmp"), ("CMYK", "jpg"),
     ("CMYK", "tif"), ("YCbCr", "tif"), ("LAB", "tif"), ("L", "jpg"), ("RGB", "ppm")],
)  # fmt: skip
def test_other_modes_are_pillows_conversion(mode: str, suffix: str, tmp_path: Path) -> None:
    place = tmp_path / f"i.{suffix}"
    image = palette("P") if mode == "P" else noise("L").convert("1") if mode == "1" else noise(mode)
    image.save(place)
    with Image.open(place) as opened:
        assert opened.mode == mode
    assert (seen(place) == np.asarray(load_image(str(place)))).all()


# ----------------------------------------------------------------------------------------------------- where they stand


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    made = io.BytesIO()
    noise().save(made, "JPEG", quality=95)
    return made.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


INSIDE: dict[str, Any] = {
    "data": lambda own: "data:image/jpeg;base64," + b64(own),
    "data in lines": lambda own: "data:image/jpeg;base64," + base64.encodebytes(own).decode(),
    "data, a name": lambda own: "DATA:image/jpeg;name=a.jpg;BASE64," + b64(own).rstrip("="),
    "bare": b64,
    "bare in lines": lambda own: base64.encodebytes(own).decode(),
    "bytes": lambda own: own,
    "struct": lambda own: {"bytes": own, "path": "gone.jpg"},
    "struct of base64": lambda own: {"bytes": b64(own), "path": None},
    "struct of data": lambda own: {"bytes": "data:;base64," + b64(own)},
    "struct and more": lambda own: {"bytes": own, "path": None, "width": 21},
}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_picture_inside_a_record_is_read_like_a_file(kind: str, jpeg: bytes, tmp_path: Path) -> None:
    value = INSIDE[kind](jpeg)
    assert content_of(value) == jpeg
    for given in (value, [value, value]):
        values = {"text_input": "q", "text_output": "a", "image_input": given}
        record = make_record(values, 3, pictures=tmp_path / "pictures")
        assert len(set(record.image_input)) == 1
        place = Path(record.image_input[0])
        assert place.is_relative_to(tmp_path / "pictures")
        assert place.read_bytes() == jpeg
        assert (seen(place) == np.asarray(Image.open(io.BytesIO(jpeg)))).all()
    # Also in a conversation.
    said = [{"role": "user", "content": [{"type": "image", "image": value}, {"type": "text", "text": "q"}]}]
    answer = {"role": "assistant", "content": [{"type": "latent", "image": value}, {"type": "text", "text": "a"}]}
    record = make_record({"messages": [*said, answer]}, 3, pictures=tmp_path / "pictures")
    assert record.image_input == record.image_output == (str(place),)


def test_lines_and_parquet_hold_pictures(jpeg: bytes, tmp_path: Path) -> None:
    row = {"text_input": "q", "text_output": "a"}
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text(json.dumps(row | {"image_input": "data:image/jpeg;base64," + b64(jpeg)}) + "\n")
    columns = {"image_input": [jpeg], "image_output": [[{"bytes": jpeg, "path": None}]]}
    pq.write_table(pa.table({key: [value] for key, value in row.items()} | columns), table)
    found = []
    for file in (lines, table):
        (piece,) = pieces([file])
        (record,) = read_piece(piece, file, tmp_path / "pictures")
        assert isinstance(record, Record), record
        found += [*record.image_input, *record.image_output]
    assert len(found) == 3
    assert {Path(path).read_bytes() for path in found} == {jpeg}
    # A command without a cache of its own takes the user's.
    assert Path(make_record(lines.read_text(), 1).image_input[0]).read_bytes() == jpeg


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("data:image/png;base64,iVBOR*w0KGgo", "a picture is not whole base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "a picture is a data: URI without base64"),
        ({"bytes": "?"}, "a picture is not whole base64"),
        ({"url": "i.png"}, "expected a path or a list of paths, found {'url': 'i.png'}"),
    ],
)
def test_what_cannot_be_decoded_is_a_fault(value: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        make_record({"text_input": "q", "text_output": "a", "image_input": [value]}, 3, pictures=tmp_path)
    assert (caught.value.fault.line, caught.value.fault.field, caught.value.fault.what) == (3, "image_input", what)


@pytest.mark.parametrize(
    "value",
    ["/9j/photo.jpg", "/9j/" + "a" * 200 + ".jpg", {"path": "i.png", "bytes": None}, "Qk/a", "folder/" * 20 + "name"],
)
def test_a_path_stays_a_path(value: Any, tmp_path: Path) -> None:
    record = make_record({"text_input": "q", "text_output": "a", "image_input": value}, 3, pictures=tmp_path)
    assert record.image_input == (value["path"] if isinstance(value, dict) else value,)


def test_file_addresses_are_paths(tmp_path: Path) -> None:
    finder = ImageFinder((tmp_path,))
    place = tmp_path / "a b%41.png"
    noise().save(place)
    for path in (place.as_uri(), f"file://{place}", f"file://localhost{place}", "file://a b%41.png", place.name):
        assert finder.find(RECORD, "image_input", path) == place


@pytest.mark.parametrize("path", ["http://a.org/i.png", "https://a.org/i.png", "s3://bucket/i.png", "HTTPS://a.org/i"])
def test_other_addresses_are_refused(path: str, tmp_path: Path) -> None:
    for look in (ImageFinder((tmp_path,)).size, ImageFinder((tmp_path,)).load):
        with pytest.raises(RecordError) as caught:
            look(RECORD, "image_input", path)
        what = f"'{path}' is an address, and images are read from files alone"
        assert caught.value.fault == Fault(7, "image_input", what, "download it, and write the path of the file")


def test_import_takes_pictures_out_of_the_rows(jpeg: bytes, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    row = {"query": "<image><image>q", "response": "a", "images": [b64(jpeg), "data:image/jpeg;base64," + b64(jpeg)]}
    source.write_text(json.dumps(row) + "\n")
    import_records(str(source), ImportSpec(out=tmp_path / "out"))
    (file,) = (tmp_path / "out").glob("*.jsonl")
    for path in json.loads(file.read_text())["image_input"]:
        assert (file.parent / path).read_bytes() == jpeg
        assert path.endswith(".jpg")


def test_png_notes_are_walked_and_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "i.png"
    noise().save(place, exif=exif(6))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert ImageFinder((tmp_path,)).size(RECORD, "image_input", "i.png") == (21, 13)


@pytest.mark.parametrize("read", ["size", "load"])
def test_a_request_to_stop_while_a_picture_is_read_is_no_broken_picture(
    read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped("SIGINT")

    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    record = make_record({"text_input": "<image>?", "text_output": "!", "image_input": "a.png"}, 1)
    monkeypatch.setattr("mirage_ds.data.images.opened", stopped)
    with pytest.raises(Stopped):
        getattr(ImageFinder((tmp_path,)), read)(record, "image_input", "a.png")

"""A stranger's bar charts as they lie: every layout, written by the libraries themselves, is the same records."""

from __future__ import annotations

import io
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image, ImageDraw
from support.indices import open_index

from mirage_ds.analysis.controls.spec import ControlsSpec
from mirage_ds.analysis.inspect.command import InspectSpec
from mirage_ds.cli import cli
from mirage_ds.config.columns import parse_columns
from mirage_ds.config.run import RunConfig
from mirage_ds.curate.spec import ImportSpec, MixSpec, RationalizeSpec, VarySpec
from mirage_ds.data import flat, folders, record_files, sources
from mirage_ds.data.encode import Encoder
from mirage_ds.data.frames import rows_of_frame
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, make_record
from mirage_ds.data.record_files import LOOKED, forms_of, read_piece, read_records, scan, told
from mirage_ds.errors import UserError
from mirage_ds.evaluate.spec import EvaluateSpec

COUNT = 5
Rows = list[dict[str, Any]]


def chart(heights: list[int], outlined: int | None) -> Image.Image:
    image = Image.new("RGB", (84, 84), "white")
    draw = ImageDraw.Draw(image)
    for at, height in enumerate(heights):
        draw.rectangle(
            (8 + 24 * at, 80 - height, 24 + 24 * at, 80), fill="steelblue", outline="red" if at == outlined else None
        )
    return image


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A folder of PNGs, and what is asked of each: a comma, quotes, lines and no ASCII in the texts."""
    folder = tmp_path_factory.mktemp("bars")
    (folder / "png").mkdir()
    rows = []
    for number in range(COUNT):
        heights = [10 + 7 * number, 60 - 5 * number, 33]
        chart(heights, None).save(folder / f"png/{number}.png")
        chart(heights, 1).save(folder / f"png/{number}_helper.png")
        rows.append(
            {
                "question": f'Wie hoch ist „B“, the "second" bar,\nin chart {number}?',
                "answer": str(60 - 5 * number),
                "image": f"png/{number}.png",
                "helper": f"png/{number}_helper.png",
            }
        )
    return folder, rows


@pytest.fixture
def mine(bars: tuple[Path, Rows], tmp_path: Path) -> tuple[Path, Rows]:
    """A copy to write into."""
    shutil.copytree(bars[0], tmp_path / "mine")
    return tmp_path / "mine", bars[1]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stored(folder: Path, rows: Rows) -> datasets.Dataset:
    """With the pictures themselves."""
    whole = [row | {name: str(folder / row[name]) for name in ("image", "helper")} for row in rows]
    made = datasets.Dataset.from_list(whole)
    return made.cast_column("image", datasets.Image()).cast_column("helper", datasets.Image())


def renamed(rows: Rows, **names: str) -> Rows:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def frame(rows: Rows) -> pandas.DataFrame:
    return pandas.DataFrame(rows)


def put(file: Path, rows: Any, indent: int | None = None) -> Path:
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    return file


def lines(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def talk(question: Any, answer: Any, **more: Any) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def csv_of(folder: Path, rows: Rows) -> Path:
    frame(rows).to_csv(folder / "bars.csv", index=False)
    return folder / "bars.csv"


def folder_with_csv(folder: Path, rows: Rows) -> Path:
    frame(rows).to_csv(folder / "bars.csv")
    return folder


def excel_csv(folder: Path, rows: Rows) -> Path:
    frame(rows).to_csv(
        folder / "bars.csv", index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n", quoting=1
    )
    return folder / "bars.csv"


def tsv(folder: Path, rows: Rows) -> Path:
    frame(rows).to_csv(folder / "bars.tsv", index=False, sep="\t")
    return folder / "bars.tsv"


def parquet_paths(folder: Path, rows: Rows) -> Path:
    frame(rows).to_parquet(folder / "bars.parquet")
    return folder / "bars.parquet"


def parquet_pictures(folder: Path, rows: Rows) -> Path:
    stored(folder, rows).to_parquet(folder / "bars.parquet")
    return folder / "bars.parquet"


def feather(folder: Path, rows: Rows) -> Path:
    frame(rows).to_feather(folder / "bars.feather")
    return folder / "bars.feather"


def saved(folder: Path, rows: Rows) -> Path:
    stored(folder, rows).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def saved_split(folder: Path, rows: Rows) -> Path:
    datasets.DatasetDict(train=stored(folder, rows)).save_to_disk(folder / "saved")
    return folder / "saved"


def image_folder(folder: Path, rows: Rows) -> Path:
    lines(folder / "metadata.jsonl", renamed(rows, image="file_name", helper="helper_file_name"))
    assert len(datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")) == len(rows)
    return folder


def image_folder_csv(folder: Path, rows: Rows) -> Path:
    frame(renamed(rows, image="file_name", helper="helper_file_name")).to_csv(folder / "metadata.csv", index=False)
    return folder


def messages(folder: Path, rows: Rows) -> Path:
    """The helper is an image of the assistant's turn."""
    made = [
        talk(
            [{"type": "image", "image": row["image"]}, text(row["question"])],
            [{"type": "image", "image": row["helper"]}, text(row["answer"])],
        )
        for row in rows
    ]
    return lines(folder / "rows.jsonl", made)


def llama_factory(folder: Path, rows: Rows) -> Path:
    made = [
        {
            "conversations": [
                {"from": "human", "value": f"<image>{row['question']}"},
                {"from": "gpt", "value": f"<image>{row['answer']}"},
            ],
            "images": [row["image"], row["helper"]],
        }
        for row in rows
    ]
    return put(folder / "sharegpt.json", made, 2)


def alpaca(folder: Path, rows: Rows) -> Path:
    made = [
        {"instruction": row["question"], "input": "", "output": row["answer"], "images": [row["image"]],
         "helper_image": row["helper"]}
        for row in rows
    ]  # fmt: skip
    return put(folder / "alpaca.json", made)


def swift(folder: Path, rows: Rows) -> Path:
    made = [
        talk(f"<image>{row['question']}", row["answer"], images=[row["image"]], helper_images=[row["helper"]])
        for row in rows
    ]
    return lines(folder / "swift.jsonl", made)


def swift_query(folder: Path, rows: Rows) -> Path:
    made = [
        {
            "query": f"<img>{row['image']}</img>{row['question']}",
            "response": f"<img>{row['helper']}</img>{row['answer']}",
        }
        for row in rows
    ]
    return lines(folder / "swift.jsonl", made)


def trl(folder: Path, rows: Rows) -> Path:
    """Prompt and completion as messages, the pictures in a column of `datasets`."""
    made = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
            "images": [str(folder / row["image"])],
            "helper": str(folder / row["helper"]),
        }
        for row in rows
    ]
    whole = datasets.Dataset.from_list(made).cast_column("images", datasets.List(datasets.Image()))
    whole.cast_column("helper", datasets.Image()).to_parquet(folder / "trl.parquet")
    return folder / "trl.parquet"


def array(folder: Path, rows: Rows) -> Path:
    frame(rows).to_json(folder / "bars.json", orient="records", indent=2, force_ascii=False)
    return folder / "bars.json"


def numbers(folder: Path, rows: Rows) -> Path:
    return lines(folder / "rows.jsonl", [row | {"answer": int(row["answer"])} for row in rows])


def own_names(folder: Path, rows: Rows) -> Path:
    frame(renamed(rows, question="Frage", answer="Höhe", image="Bild", helper="Skizze")).to_csv(folder / "a.csv")
    return folder / "a.csv"


def lists(folder: Path, rows: Rows) -> Path:
    """A frame whose cells are lists, as pandas writes them."""
    frame([row | {"image": [row["image"]]} for row in rows]).to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


def blanks(folder: Path, rows: Rows) -> Path:
    frame(renamed(rows, question="Frage, kurz", answer="Höhe ")).to_csv(folder / "a.csv", index=False)
    return folder / "a.csv"


OWN = "question=Frage,answer=Höhe,image=Bild,helper=Skizze"
# How the rows are written, and what --columns is.
LAYOUTS: list[tuple[Callable[[Path, Rows], Path], str | None]] = [
    *((write, None) for write in (
        csv_of, folder_with_csv, excel_csv, tsv, lists, array, numbers, parquet_paths, parquet_pictures, feather,
        saved, saved_split, image_folder, image_folder_csv, messages, llama_factory, alpaca, swift, swift_query, trl,
    )),
    (own_names, OWN), (blanks, "question=Frage, kurz, answer=Höhe , image=image,helper=helper"),
]  # fmt: skip


def seen(records: list[Record], source: Path) -> list[tuple]:
    """Texts, and pixels of each picture."""
    finder = ImageFinder.beside(source, None)

    def pixels(record: Record, name: str) -> list[bytes]:
        return [finder.load(record, name, path).tobytes() for path in getattr(record, name)]

    return [
        (
            record.text_input.replace("<image>", ""),
            record.text_output.replace("<output_image>", ""),
            pixels(record, "image_input"),
            pixels(record, "image_output"),
        )
        for record in records
    ]


def expected(folder: Path, rows: Rows) -> list[tuple]:
    return [
        (row["question"], row["answer"], *([Image.open(folder / row[name]).tobytes()] for name in ("image", "helper")))
        for row in rows
    ]


@pytest.mark.parametrize(("write", "columns"), LAYOUTS, ids=lambda one: getattr(one, "__name__", None))
def test_every_layout_is_the_same_records(
    write: Callable[[Path, Rows], Path], columns: str | None, mine: tuple[Path, Rows], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Through the reader of --data_path, in pieces of a row or two, of the commands, and `data import`."""
    folder, rows = mine
    source, names = write(folder, rows), parse_columns(columns)
    monkeypatch.setattr(sources, "PIECE_BYTES", 150)
    monkeypatch.setattr(sources, "PIECE_ROWS", 2)
    files = folders.find_files(source)
    cut = list(sources.pieces(files))
    assert len(cut) > 1
    trained: list[Any] = [one for piece in cut for one in read_piece(piece, files[piece.file], tmp_path / "p", names)]
    wanted = expected(folder, rows)
    assert seen(trained, source) == wanted
    assert seen(read_records(source, columns=names), source) == wanted
    flags = ["--columns", columns] if columns else []
    cli.main(["data", "import", str(source), "--out", str(tmp_path / "out"), *flags], standalone_mode=False)
    made, faults = scan(tmp_path / "out/data.jsonl")
    assert not faults
    assert seen(made, tmp_path / "out/data.jsonl") == wanted
    # What it was taken for is said in the words that say it.
    said = list(told(source, names))
    again = parse_columns(said[0].split("read as ")[1].split(" ")[0]) if said else names
    assert seen(read_records(source, columns=again), source) == wanted
    assert not list(told(source, again))


def test_a_row_far_behind_is_no_fault_of_the_file(tmp_path: Path) -> None:
    """A named column may come late; another row on the way there may be taken for nothing, and be left out."""
    rows = [{"question": "Q", "answer": "A"}] * LOOKED
    odd = {"question": "Q", "answer": "A", "image": "a.png", "picture": "b.png"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, odd, {**rows[0], "hint": "c.png"}]))
    names = parse_columns("question=question,answer=answer,helper=hint")
    assert list(told(file, names)) == []
    _, faults = scan(file, columns=names)
    assert [fault.line for fault in faults] == [LOOKED + 1]


# -------------------------------------------------------------------------------------------------- what is not obvious

PLAIN = {"question": "Q", "answer": "A"}
BOX = {**PLAIN, "image": "png/0.png"}


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({**BOX, "solution": "B"}, None, "answer: may be answer or solution; say which by --columns answer=answer"),
        ({**BOX, "picture": "x.png"}, None, "image: may be image or picture; say which by --columns image=image"),
        ({"prompt": "P", **BOX}, None, "question: may be prompt or question; say which by --columns question=prompt"),
        (BOX, "helper=sketch", r"helper=sketch: .*rows.jsonl has no such column; it has question, answer, image"),
        ({"prompt": [1], "completion": [1], "messages": [1]}, None,
         "prompt: stands beside messages in 3.* a row has one conversation; name it: --columns messages=messages"),
        ({"text_input": "Q", "text_output": "A", "mask": "h.png"}, "helper=maskk",
         "helper=maskk: .*rows.jsonl has no such column; it has text_input, text_output, mask"),
        (BOX, "helper", r"--columns helper: helper has no column; write helper=NAME"),
        (BOX, "qestion=x", r"'qestion' is no role \(did you mean 'question'\?\)"),
        (BOX, "question=a,question=b", "question is one column, and 2 are named"),
        (BOX, "messages=a,answer=b", "messages hold question and answer; leave these out"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_asked_for(row: dict, columns: str | None, said: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", [row] * 3)
    with pytest.raises(UserError, match=said):
        read_records(source, columns=parse_columns(columns))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"answer": "A", "image": "a.png"}] * 300,
         "question: missing (the row has ['answer', 'image']) in 300 of 300 records, e.g. lines 1, 2, 3; "
         "give --columns question=COLUMN"),
        ([PLAIN, {"question": "Q", "answer": None}, PLAIN, {"question": "Q", "answer": ""}],
         "answer: answer is missing or empty in 2 of 4 records, e.g. lines 2, 4; fill it, or leave the row out"),
        ([PLAIN, {"question": "Q", "answer": ["A"]}],
         "line 2, answer: expected a string, found ['A']; write it as a string"),
    ],
)  # fmt: skip
def test_what_a_file_lacks_is_said_once(rows: Rows, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as error:
        read_records(source)
    others = f" (`mirage-ds data check {source}` lists them)" if "e.g." in said else ""
    assert str(error.value) == f"{source}: {said}{others}"
    with pytest.raises(UserError) as error:
        cli.main(["data", "import", str(source), "--out", str(tmp_path / "out")], standalone_mode=False)
    assert str(error.value) == f"{source}, {said}"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["data", "check", str(source), "--stage", "sft"], standalone_mode=False)
    field = said.split(": ", maxsplit=1)[0].rsplit(", ", maxsplit=1)[-1]
    assert sum(f" {field} " in line for line in capsys.readouterr().out.splitlines()) == 1


def test_several_columns_of_pictures_and_a_systems_text(mine: tuple[Path, Rows]) -> None:
    rows = [
        {"system": "S", "q": "<image> or <image>?", "a": "<output_image>first<output_image>", "x": one["image"],
         "y": one["helper"], "h": one["helper"], "i": one["image"]}
        for one in mine[1]
    ]  # fmt: skip
    frame(rows).to_csv(mine[0] / "several.csv", index=False)
    names = parse_columns("question=q,answer=a,image=x,image=y,helper=h,helper=i")
    (record, *_) = read_records(mine[0] / "several.csv", columns=names)
    assert record.image_input == record.image_output[::-1] == ("png/0.png", "png/0_helper.png")
    assert record.turns_before == [{"role": "system", "content": "S"}]
    # A record may have a helper of its own name too.
    row = {"text_input": "Q", "text_output": "A", "sketch": "h.png"}
    assert make_record(row, 1, columns=parse_columns("helper=sketch")).image_output == ("h.png",)


@pytest.mark.parametrize(
    ("more", "columns", "kept", "unread"),
    [
        ({"image_2": "b.png", "note": "N"}, None, ["image_2", "note"], "image_2"),
        ({"file": "a.png", "mask": "m.png"}, None, ["file", "mask"], "mask"),
        # A picture itself would go into the index as text.
        ({"thumb": {"bytes": b"PNG"}, "n": 1}, "image=image", ["n"], "thumb"),
        ({"p": [b"PNG"], "o": "o.png"}, "question=question,answer=answer,image=image", ["o"], "p, o"),
    ],
)  # fmt: skip
def test_pictures_that_are_not_read_are_said(
    more: dict, columns: str | None, kept: list[str], unread: str, tmp_path: Path
) -> None:
    names, row = parse_columns(columns), {**PLAIN, "image": "a.png", **more}
    assert [*make_record(row, 1, columns=names).extra] == kept
    (form,) = forms_of("rows", [row], names)
    read = f"question=question,answer=answer,image=image, without the pictures of {unread}"
    assert form == f"rows: read as {read} (--columns names others)"


@pytest.mark.parametrize("columns", ["question=q,answer=a,helper=h", "messages=talk", "question=q"])
def test_a_record_may_stand_beside_rows_of_named_columns(columns: str, tmp_path: Path) -> None:
    """As --eval_data_path, and as a line of a file in which others are the user's own."""
    record = {"text_input": "Q", "text_output": "A", "q": None}
    (made,) = read_records(lines(tmp_path / "public.jsonl", [record]), columns=parse_columns(columns))
    assert (made.text_input, made.text_output) == ("Q", "A")


def test_named_columns_are_looked_for_in_the_whole_source_and_every_form_is_said(tmp_path: Path) -> None:
    rows = [PLAIN] * record_files.LOOKED + [{**PLAIN, "mask": "h.png"}]
    source, names = lines(tmp_path / "a.jsonl", rows), parse_columns("helper=mask")
    assert read_records(source, columns=names)[-1].image_output == ("h.png",)
    # One source of a mixture has it, and so has one file of a folder.
    lines(tmp_path / "b.jsonl", [PLAIN, {"prompt": "P", "output": "O", "mask": "h.png"}, BOX])
    said = list(told(tmp_path, names))
    assert [line.split(" (")[0].split("read as ")[1] for line in said] == [
        "question=question,answer=answer,helper=mask",
        "question=prompt,answer=output,helper=mask",
        "question=question,answer=answer,image=image,helper=mask",
    ]


def test_a_frame_is_the_records_of_its_file(bars: tuple[Path, Rows]) -> None:
    folder, rows = bars
    wanted = expected(folder, rows)
    pictured = frame(rows)
    pictured["image"] = [Image.open(folder / name) for name in pictured["image"]]
    pictured["helper"] = [(folder / name).read_bytes() for name in pictured["helper"]]
    pixels = [row | {name: np.asarray(Image.open(folder / row[name])) for name in ("image", "helper")} for row in rows]
    # As printers take it: PNG cannot hold it.
    inked = [row | {"image": Image.open(folder / row["image"]).convert("CMYK")} for row in rows]
    tensors = [row | {"image": torch.tensor(row["image"]).permute(2, 0, 1) / 255} for row in pixels]
    whole = stored(folder, rows)
    for data in (
        pictured, frame(rows), frame(rows).convert_dtypes(), whole, whole.to_pandas(), whole.data.table, list(whole),
        whole.to_iterable_dataset(), pixels, tensors, [row | {"image": folder / row["image"]} for row in rows],
    ):  # fmt: skip
        records = [make_record(row, line) for line, row in enumerate(rows_of_frame(data), 1)]
        assert seen(records, folder / "any") == wanted
    assert len(list(rows_of_frame(inked))) == len(rows)
    for data in (["a"], datasets.DatasetDict(train=whole), [{"image": np.ones((5, 5, 9))}]):
        with pytest.raises(
            UserError, match=r"expected a dict, found str|give one data set of it|line 1: a picture is an"
        ):
            list(rows_of_frame(data))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.csv", "b.json"], r"files of one kind, but a.csv, b.json; name the records, such as .*a.csv"),
        (["test-00000-of-00001.jsonl", "train-00000-of-00001.jsonl"], r"splits train, test; .* such as '.*/train-\*'"),
        (["train/metadata.csv", "test/metadata.csv"], "name the records, such as .*test"),
        ([], "name the records$"),
    ],
)  # fmt: skip
def test_a_folder_in_which_it_is_not_clear_what_is_meant(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frame([BOX]).to_csv(tmp_path / name) if name.endswith("csv") else put(tmp_path / name, [BOX])
    with pytest.raises(UserError, match=said):
        folders.find_files(tmp_path)


def test_splits_are_named_and_an_import_takes_the_one_that_is_asked_for(
    bars: tuple[Path, Rows], tmp_path: Path
) -> None:
    whole = stored(*bars)
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"has the splits train, test; name one of them, such as .*both/train"):
        folders.find_files(tmp_path / "both")
    for split, count in (("train", COUNT), ("test", 1)):
        assert len(read_records(tmp_path / "both" / split)) == count
        cli.main(
            ["data", "import", str(tmp_path / "both"), "--out", str(tmp_path / split), "--split", split],
            standalone_mode=False,
        )
        assert len(read_records(tmp_path / split / "data.jsonl")) == count
    (tmp_path / "both/train/state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as `datasets` saves it"):
        folders.find_files(tmp_path / "both/train")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"a": 1}, {"b": }]', r"item 2 is not valid JSON \(Expecting value: .*\); correct it"),
        ("a.json", b'[{"a": 1}, {"b": 2}', r"ends before the array's closing \]; fetch or write it anew"),
        ("a.json", b'[{"a": 1}]\n[{"b": 1}]', r"goes on after the array's closing \]"),
        ("a.json", b"[" + b'{"a": ' * 90_000, "item 1 is not valid JSON"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv, line 3: 1 values for 2 columns"),
        ("a.csv", b'a,b\n1,2\n3,"x\n', r"a.csv, line 3: no table \(.*unexpected end of data"),
        ("a.csv", "a,b\nä,2\n".encode("latin-1"), "a.csv, line 2: not UTF-8 text; save it as CSV in UTF-8"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: has two columns 'a'; rename one"),
        ("a.arrow", b"ARROW1\0\0nothing", r"a.arrow: cannot be read as Arrow \("),
    ],
)  # fmt: skip
def test_a_file_that_is_broken_is_one_sentence(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        [list(sources.rows_of(piece, tmp_path / name)) for piece in sources.pieces([tmp_path / name])]


def test_a_broken_item_is_found_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the end of the file; and an item that a block cuts anywhere is no broken one."""
    (tmp_path / "a.json").write_text('[{"a": oops},' + '{"a": 1},' * 100_000 + '{"a": 1}]')
    with (tmp_path / "a.json").open("rb") as file:
        with pytest.raises(UserError, match="item 1 is not valid JSON"):
            list(flat.array_items(file, tmp_path))
        assert file.tell() < 300_000
    row = '{"a\\ud83d\\ude00": [-1.5e+10, true, false, null, "\\n"]   ,  "b" : {}}'
    for size in range(2, len(row)):
        monkeypatch.setattr(flat, "READ_BYTES", size)
        found = [text for _, _, _, text in flat.array_items(io.BytesIO(f"[{row}, {row}]".encode()), tmp_path)]
        assert found == [row, row], size


@pytest.mark.parametrize("write", ["to_parquet", "save_to_disk", ""])
def test_a_class_is_its_name(write: str, tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list([{"question": "Q", "answer": number} for number in (1, 0, -1)])
    whole = whole.cast_column("answer", datasets.ClassLabel(names=["cat", "dog"]))
    place = tmp_path / "a.parquet" if write == "to_parquet" else tmp_path / "a"
    if write:
        getattr(whole, write)(place)
        files = folders.find_files(place)
        rows = [row for piece in sources.pieces(files) for _, row in sources.rows_of(piece, files[piece.file])]
    else:
        rows = list(rows_of_frame(whole))
        assert rows == list(rows_of_frame(whole.data.table)) == list(rows_of_frame(whole.to_iterable_dataset()))
    assert [row["answer"] for row in rows] == ["dog", "cat", None]


def test_a_piece_knows_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    file = tmp_path / "a.csv"
    file.write_bytes(b'a;b\n\n1;"2\n2"\n\n\n3;\n')
    cut = list(sources.pieces([file]))
    found = [row for piece in cut for row in sources.rows_of(piece, file)]
    assert (len(cut), found) == (2, [(3, {"a": "1", "b": "2\n2"}), (7, {"a": "3", "b": None})])


def test_a_large_array_and_a_large_table_are_never_held_as_a_whole(tmp_path: Path) -> None:
    rows = [{"question": "ü" * 5000, "answer": f'"{number}"\n'} for number in range(400)]
    put(tmp_path / "a.json", rows)
    frame(rows).to_csv(tmp_path / "a.csv", index=False)
    for file in (tmp_path / "a.json", tmp_path / "a.csv"):
        tracemalloc.start()
        cut = list(sources.pieces([file]))
        found = 0
        for piece in cut:
            for _, row in sources.rows_of(piece, file):
                found += 1
                read = json.loads(row) if isinstance(row, str) else row
                assert read["answer"] == f'"{found - 1}"\n'
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (found, len(cut) > 10) == (len(rows), True)
        # The file has 4 MB.
        assert peak < 2e6, (file.name, peak)


def test_every_command_that_reads_records_takes_columns(mine: tuple[Path, Rows], tmp_path: Path) -> None:
    for spec in (RunConfig, EvaluateSpec, ControlsSpec, InspectSpec, VarySpec, MixSpec, ImportSpec, RationalizeSpec):
        assert "columns" in spec.model_fields, spec
    source = str(own_names(*mine))
    for words in (
        ["data", "check", source],
        ["data", "show", source, "--out", str(tmp_path / "page.html")],
        ["data", "mix", source, "--out", str(tmp_path / "mixed")],
        ["data", "vary", "helper-input", source, "--out", str(tmp_path / "varied")],
        ["init", "--preset", "nano", "--config_only", "--out", str(tmp_path / "m"), "--text", source],
    ):
        cli.main([*words, "--columns", OWN], standalone_mode=False)
    assert seen(read_records(tmp_path / "mixed/data.jsonl"), tmp_path / "mixed/data.jsonl") == expected(*mine)


def test_an_index_is_that_of_its_columns(encoder_for: Callable[..., Encoder], mine: tuple[Path, Rows]) -> None:
    source = lines(mine[0] / "two.jsonl", [row | {"other": "B"} for row in mine[1]])
    encoder = encoder_for("sft", 2, beside=source)
    one, other, again = (
        open_index(source, encoder, columns=parse_columns(columns)) for columns in (None, "answer=other", None)
    )
    assert one.place == again.place != other.place
    assert [index.record(0).text_output for index in (one, other)] == ["60", "B"]
    with pytest.raises(UserError, match=r"--columns answer=none: .* has no such column"):
        open_index(source, encoder, columns=parse_columns("answer=none"))


def test_import_takes_a_pattern_of_files_of_one_folder(mine: tuple[Path, Rows], tmp_path: Path) -> None:
    folder, rows = mine
    lines(folder / "part-0.jsonl", rows[:1])
    lines(folder / "part-1.jsonl", rows[1:])
    pattern = str(folder / "part-*.jsonl")
    cli.main(["data", "import", pattern, "--out", str(tmp_path / "out")], standalone_mode=False)
    written = tmp_path / "out/data.jsonl"
    assert seen(read_records(written), written) == expected(*mine)
    (tmp_path / "other").mkdir()
    lines(tmp_path / "other/part-0.jsonl", rows)
    lines(folder.parent / "x.jsonl", rows)
    for name, says in (("*/part-*.jsonl", "name one folder"), ("none-*.jsonl", "no file has such a name")):
        with pytest.raises(UserError, match=says):
            cli.main(["data", "import", str(tmp_path / name), "--out", str(tmp_path / "no")], standalone_mode=False)

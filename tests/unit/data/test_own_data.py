"""A stranger's bar charts as they lie: every layout, written by the libraries themselves, is the same records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from PIL import Image, ImageDraw

from mirage_ds.cli import cli
from mirage_ds.config.columns import parse_columns
from mirage_ds.data import folders, sources
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.data.record_files import read_piece, read_records, scan, told

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


OWN = "question=Frage,answer=Höhe,image=Bild,helper=Skizze"
# How the rows are written, and what --columns is.
LAYOUTS: list[tuple[Callable[[Path, Rows], Path], str | None]] = [
    *((write, None) for write in (
        csv_of, folder_with_csv, excel_csv, tsv, lists, array, numbers, parquet_paths, parquet_pictures, feather,
        saved, saved_split, image_folder, image_folder_csv, messages, llama_factory, alpaca, swift, swift_query, trl,
    )),
    (own_names, OWN),
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
    write: Callable[[Path, Rows], Path], columns: str | None, bars: tuple[Path, Rows], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Through the reader of --data_path, in pieces of a row or two, of the commands, and `data import`."""
    folder, rows = tmp_path / "mine", bars[1]
    shutil.copytree(bars[0], folder)
    source, names = write(folder, rows), parse_columns(columns)
    monkeypatch.setattr(sources, "PIECE_BYTES", 150)
    files = folders.find_files(source)
    cut = list(sources.pieces(files))
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

"""Several sources with weights: how many rows each gives, which these are, and who else has to know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.indices import selected

from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.config.columns import parse_columns
from mirage_ds.config.flags import build_model
from mirage_ds.config.mixture import Mixture, records_of
from mirage_ds.config.run import RunConfig
from mirage_ds.data.encode import Encoder
from mirage_ds.data.folders import find_files
from mirage_ds.data.selection import Selection, content, describe, weighed
from mirage_ds.errors import UserError
from mirage_ds.run.records import index_beforehand
from mirage_ds.study.nodes import records_hash
from mirage_ds.study.overview import rows_of, steps_of

Make = Callable[..., Encoder]
LENGTHS = {"a": 12, "b": 8, "c": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.jsonl, b.jsonl and deep/c.jsonl, of 12, 8 and 5 rows, each with its own questions."""
    made = tmp_path_factory.mktemp("parts")
    (made / "deep").mkdir()
    for name, count in LENGTHS.items():
        rows = [{"text_input": f"{name} {number}?", "text_output": f"\\boxed{{{number}}}"} for number in range(count)]
        place = made / ("deep" if name == "c" else ".") / f"{name}.jsonl"
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def named(folder: Path, *texts: str) -> Mixture:
    found = records_of([folder / text for text in texts])
    assert isinstance(found, Mixture)
    return found


def opened(mixture: Mixture, encoder_for: Make, cache: Path) -> Selection:
    return selected(mixture, encoder_for("sft"), 4096, 0.1, cache_dir=cache)


def questions(index: Selection) -> list[str]:
    return [index.rows.record(int(row)).text_input for row in index.row_ids]


@pytest.mark.parametrize(
    ("texts", "counts"),
    [
        (["a.jsonl", "b.jsonl"], {"a": 12, "b": 8}),
        (["a.jsonl:1", "b.jsonl:1"], {"a": 8, "b": 8}),
        (["b.jsonl:1", "a.jsonl:3"], {"a": 12, "b": 4}),
        (["deep/c.jsonl:5", "a.jsonl:2", "b.jsonl:1"], {"a": 2, "b": 1, "c": 5}),
        (["a.jsonl:0.5", "b.jsonl:0.25"], {"a": 12, "b": 6}),
    ],
)
def test_rows_are_as_the_weights_and_none_comes_twice(
    texts: list[str], counts: dict[str, int], folder: Path, encoder_for: Make, tmp_path: Path
) -> None:
    mixture = named(folder, *texts)
    whole = opened(mixture, encoder_for, tmp_path)
    found = weighed(whole, mixture, 42)
    asked = questions(found)
    assert Counter(question[0] for question in asked) == counts
    assert len(set(asked)) == len(asked)
    # What was measured of a row stays with it.
    place = {int(row): at for at, row in enumerate(whole.row_ids)}
    for name in ("tokens", "labels", "runs", "latents", "patches"):
        assert [int(one) for one in getattr(found, name)] == [
            int(getattr(whole, name)[place[int(row)]]) for row in found.row_ids
        ]
    said = describe(found, mixture)
    assert said == ", ".join(f"{counts[part.file.stem]} of {part.file}" for part in mixture.parts)


def test_the_choice_is_the_seeds_and_covers_the_source(folder: Path, encoder_for: Make, tmp_path: Path) -> None:
    mixture = named(folder, "a.jsonl:1", "deep/c.jsonl:1")
    whole = opened(mixture, encoder_for, tmp_path)
    chosen = [questions(weighed(whole, mixture, seed)) for seed in range(40)]
    assert chosen[0] == questions(weighed(whole, mixture, 0))
    # What --resume takes for the same content must choose the same rows.
    turned = named(folder, "deep/c.jsonl:2", "a.jsonl:2")
    assert content("hash", turned) == content("hash", mixture)
    assert chosen[:5] == [questions(weighed(whole, turned, seed)) for seed in range(5)]
    assert len({tuple(one) for one in chosen}) > 30
    times = Counter(question for one in chosen for question in one if question[0] == "a")
    # Five of twelve rows in each of forty draws: 16.7 times on average, with a standard deviation of 3.1.
    assert len(times) == 12
    assert all(4 < count < 29 for count in times.values())


def test_each_source_finds_its_own_images(folder: Path, mixed: Path, encoder_for: Make, tmp_path: Path) -> None:
    mixture = records_of([folder / "a.jsonl", mixed])
    index = selected(mixture, encoder_for("stage2"), 4096, 0.1, cache_dir=tmp_path)
    assert len(index.row_ids) == 24


def test_wrong_mixtures_are_refused(folder: Path, encoder_for: Make, tmp_path: Path) -> None:
    def refused(*texts: str) -> str:
        with pytest.raises(UserError) as error:
            find_files(named(folder, *texts))
        return str(error.value)

    assert refused("a.jsonl:1", "b.jsonl").endswith(
        "b.jsonl has no weight while other files have; give every file one as FILE:WEIGHT, or none"
    )
    assert refused("a.jsonl:1", "a.jsonl:2").endswith(
        "is named twice, and every row is taken at most once; name it once"
    )
    assert "is in several sources of " in refused(".", "a.jsonl")
    assert refused("a.jsonl:1", "gone.jsonl:1") == f"{folder / 'gone.jsonl'}: no such file of records"
    assert "the weight is '0'" in refused("a.jsonl:0", "b.jsonl:1")
    empty = folder / "long.jsonl"
    empty.write_text(json.dumps({"text_input": "long " * 400, "text_output": "\\boxed{1}"}) + "\n")
    mixture = named(folder, "a.jsonl:1", "long.jsonl:1")
    index = selected(mixture, encoder_for("sft"), 300, 0.5, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"long\.jsonl: none of its rows can be used; leave it out, or fix them"):
        weighed(index, mixture, 0)
    few = named(folder, "a.jsonl:1000", "b.jsonl:1")
    with pytest.raises(UserError, match=r"b\.jsonl: gets no row in a mixture of 12; raise its weight"):
        weighed(opened(few, encoder_for, tmp_path), few, 0)


def test_faults_say_which_command_lists_them(folder: Path, encoder_for: Make, tmp_path: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text("[]\n" * 3)
    with pytest.raises(UserError) as error:
        opened(named(folder, "a.jsonl:1", "bad.jsonl:1"), encoder_for, tmp_path)
    assert "bad.jsonl" in str(error.value)
    assert f"`mirage-ds data check {folder / 'a.jsonl'}` and `mirage-ds data check {bad}` list them" in str(error.value)
    bad.unlink()


def test_flags_and_yaml_name_one_or_several(folder: Path) -> None:
    base = dict(model="m", stage="sft", save_model_path="o")

    def config(given: tuple[Path, ...], yaml: object = None) -> RunConfig:
        return build_model(RunConfig, base | {"data_path": given}, {"data_path": yaml} if yaml is not None else None)

    # A path may have a comma, and one alone is taken as it is called.
    assert config((Path("a,b.jsonl"),)).records == Path("a,b.jsonl")
    assert config((), "a.jsonl").records == Path("a.jsonl")
    assert config((), ["a.jsonl"]).records == Path("a.jsonl")
    for several in (config((Path("a.jsonl:2"), Path("b.jsonl:1"))), config((), ["a.jsonl:2", "b.jsonl:1"])):
        assert str(several.records) == "a.jsonl + b.jsonl"
        assert isinstance(several.records, Mixture)
        assert several.records.weights == [2, 1]
        again = RunConfig.model_validate_json(several.model_dump_json())
        assert again == several
    assert json.loads(config((Path("a.jsonl"),)).model_dump_json())["data_path"] == "a.jsonl"
    with pytest.raises(UserError, match="names no records"):
        config((), [])


def test_other_weights_are_other_content_and_the_order_of_naming_is_not(folder: Path) -> None:
    one = content("hash", named(folder, "a.jsonl:1", "b.jsonl:2"))
    assert one == content("hash", named(folder, "b.jsonl:4", "a.jsonl:2"))
    assert one != content("hash", named(folder, "a.jsonl:2", "b.jsonl:1"))
    assert one != content("other", named(folder, "a.jsonl:1", "b.jsonl:2"))
    assert content("hash", named(folder, "a.jsonl", "b.jsonl")) == content("hash", folder) == "hash"


def test_other_columns_are_other_content() -> None:
    """--resume must not go on with other texts of the same file."""
    asked = (None, "answer=a", "answer=b", "question=a", "image=a,image=b", "image=b,image=a")
    found = [content("hash", Path("a.jsonl"), parse_columns(one)) for one in asked]
    assert (found[0], len(set(found))) == ("hash", len(asked))


def test_studies_count_and_tell_mixtures_apart(folder: Path) -> None:
    def config(*texts: str) -> RunConfig:
        paths = tuple(folder / text for text in texts)
        return RunConfig(
            model="m", stage="sft", save_model_path=Path("o"), data_path=paths, epochs=2, global_batch_size=4
        )

    rows_of.cache_clear()
    assert steps_of(config("a.jsonl", "b.jsonl")) == 10
    assert steps_of(config("a.jsonl:1", "b.jsonl:1")) == 8
    hashes = [
        records_hash(config(*texts).records) for texts in (("a.jsonl:1", "b.jsonl:1"), ("a.jsonl:2", "b.jsonl:1"))
    ]
    assert len({*hashes, records_hash(folder / "a.jsonl")}) == 3
    assert records_hash(config("b.jsonl:3", "a.jsonl:3").records) == hashes[0]


@pytest.mark.parametrize("tail", ["", ":1"])
def test_stage2_needs_one_row_with_latents(tail: str, folder: Path, nano: Path, tmp_path: Path) -> None:
    helped = tmp_path / "helped.jsonl"
    helped.write_text(json.dumps({"text_input": "?", "text_output": "<output_image>\\boxed{1}"}) + "\n")

    def lines_of(stage: str, *sources: Path) -> list[str]:
        values = {"model": str(nano), "stage": stage, "save_model_path": tmp_path / "run", "cache_dir": tmp_path}
        return list(
            index_beforehand(build_model(RunConfig, values | {"data_path": tuple(f"{one}{tail}" for one in sources)}))
        )

    plain = folder / "a.jsonl", folder / "b.jsonl"
    with pytest.raises(
        UserError, match=r"a\.jsonl.*: stage2 trains latents, and no record has any .*--columns helper="
    ):
        lines_of("stage2", *plain)
    assert lines_of("sft", *plain)
    assert lines_of("stage2", plain[0], helped)


def test_doctor_looks_at_every_source(folder: Path) -> None:
    one = build_model(DoctorSpec, {"data_path": (folder / "a.jsonl",)})
    assert one.files() == {"--data_path": folder / "a.jsonl"}
    two = build_model(DoctorSpec, {"data_path": (folder / "a.jsonl:2", folder / "b.jsonl:1")})
    assert two.files() == {"--data_path 1": folder / "a.jsonl", "--data_path 2": folder / "b.jsonl"}

"""Rows of files: every form they come in, what is wrong with single ones, and how many of those a job bears."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from speedstack.eval.data.rows import CORPUS_FILE, RowTally, UnusableRow, read_rows, source_files

ROWS = [{"prompt": "a\u2028b", "n": 1}, {"prompt": None, "n": 2}]


def jsonl(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS), encoding="utf-8-sig")
    return file


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    # To `datasets` the brackets are a pattern.
    line = jsonl(tmp_path / "lines" / "part[1].jsonl")
    array = tmp_path / "array.json"
    array.write_text(json.dumps(ROWS))
    table = tmp_path / "tables" / "part[2].parquet"
    table.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    (table.parent / "infos.json").write_text("{}")  # describes the data
    jsonl(tmp_path / "lines" / "part1.jsonl")
    for source in (line, array, table, table.parent):
        assert [row for _, row in read_rows(source)] == ROWS, source
    assert len(read_rows(tmp_path / "lines")) == 4
    assert [where for where, _ in read_rows(line)] == [f"{line} line 1", f"{line} line 3"]
    assert read_rows(array)[1][0] == f"{array} row 2"


def test_a_bad_line_is_a_row_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n"caf\xe9"\n[1]\n' + b"[" * 100_000 + b'\n{"a": 2}')
    rows = read_rows(file)
    assert [row for _, row in rows if isinstance(row, dict)] == [{"a": 1}, {"a": 2}]
    bad = [row for _, row in rows if isinstance(row, UnusableRow)]
    assert [error.reason.split(" (")[0] for error in bad] == ["not JSON", "not UTF-8", "not a JSON object", "not JSON"]
    assert str(bad[1]) == f"{file} line 3: not UTF-8"


def test_images_of_a_data_set_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"text": ["x"], "image": [{"bytes": b"no image", "path": None}]})
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ((where, row),) = read_rows("some/set", "validation")
    assert asked == [("some/set", "validation")] and where == "some/set validation row 1"
    assert isinstance(row, dict) and row["text"] == "x"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"x", r"is no \.jsonl, \.json or \.parquet file"),
        ("rows.parquet", b"no parquet", "cannot read .*rows.parquet"),
        ("rows.json", b'[{"a": 1},', "rows.json is not JSON"),
        ("folder/readme.md", b"", "folder has no .jsonl, .json or .parquet file"),
        (None, b"", "there is no file or directory"),
    ],
)
def test_sources_that_are_none(name: str | None, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / (name or "nowhere.jsonl")
    if name is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(file.parent if name == "folder/readme.md" else file)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no split 'test'"):
        read_rows(tmp_path, "test")


def test_a_tally_counts_names_and_bears_a_share() -> None:
    bad = [UnusableRow(f"f line {number}", "empty" if number % 2 else f"odd {number}") for number in range(1, 9)]
    tally = RowTally("f", 0.4, 20, bad)
    tally.left_out["too long"] += 2
    assert tally.summary() == (
        "8 of 20 rows of f cannot be used and were left out: f line 1: empty (and 3 more); f line 2: odd 2; "
        "f line 4: odd 4; and 2 other reasons; of 20 rows of f left out: 2 too long"
    )
    tally.check()
    tally.num_rows = 19
    with pytest.raises(ValueError, match=r"8 of 19 rows of f cannot be used, more than max_unusable_fraction 0\.4"):
        tally.check()
    assert RowTally("f", 0.0, 3).summary() == ""


def test_a_corpus_that_was_prepared_inside_a_directory_is_none_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    corpus = tmp_path / "deep" / "corpus"
    datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(str(corpus / "train"))
    with pytest.raises(ValueError, match="is a dataset as save_to_disk"):
        source_files(tmp_path)
    (corpus / CORPUS_FILE).write_text("{}")
    assert source_files(tmp_path) == [tmp_path / "text.jsonl"]

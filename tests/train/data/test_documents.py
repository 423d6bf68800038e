"""Documents are what the named files say: whatever the names, forms and faults."""

import gzip
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speedstack.eval.data.rows import source_files
from speedstack.train.data.calibration import calibration_windows
from speedstack.train.data.corpus import load_corpus, prepare_corpus, tokenize
from speedstack.train.data.documents import load_documents

TEXTS = ["alpha\nbeta", "\u2028gamma\x85 \x1c delta\r\n", "  \t", "caf\u00e9 \U0001f600", "x" * 3000]


def lines(texts: list[Any]) -> str:
    return "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts)


def put(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def texts_of(source: Path, **options: Any) -> list[str]:
    return load_documents(str(source), **options)["text"][:]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "~a", "a b", "a::b", "a%5B", "{a,b}", "hf:", "\u00fc#", "a!"])
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    file = put(tmp_path / name / f"{name}.jsonl", lines(TEXTS))
    for decoy in ("a1", "ab", "axb", "b", "a"):
        put(tmp_path / decoy / f"{decoy}.jsonl", lines(["not this"]))
        put(tmp_path / name / f"{decoy}.txt", "nor this")
    assert texts_of(file) == TEXTS
    with pytest.warns(UserWarning, match=r"the 1 \.jsonl files are read, and not 5 others, such as a\.txt"):
        assert texts_of(file.parent) == TEXTS
    table = put(tmp_path / name / "t" / f"{name}.parquet", b"")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table)
    assert texts_of(table) == texts_of(table.parent) == TEXTS


def test_every_form_has_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": text, "other": [1, {"a": None}]} for text in TEXTS]
    put(tmp_path / "lines.JSONL", lines(TEXTS))
    put(tmp_path / "marked.jsonl", b"\xef\xbb\xbf" + lines(TEXTS).replace("\n", "\r\n \r\n").encode())
    put(tmp_path / "escaped.json", "".join(json.dumps(row) + "\n\n" for row in rows))
    put(tmp_path / "array.json", json.dumps(rows, indent=2))
    put(tmp_path / "numbers.jsonl", lines(TEXTS).replace('"n": 1', '"n": NaN, "m": [-Infinity, 1e999]'))
    columns = {"text": TEXTS, "other": [b"\xff"] * len(TEXTS)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=2)
    large = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "large.parquet")
    encoded = pyarrow.table({"text": pyarrow.array(TEXTS).dictionary_encode()})
    pyarrow.parquet.write_table(encoded, tmp_path / "dictionary.parquet")
    for file in sorted(tmp_path.iterdir()):
        found = load_documents(str(file))
        assert found["text"][:] == TEXTS, file
        assert found["name"][:] == [f"{file.name}/{index}" for index in range(len(TEXTS))]


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    put(tmp_path / "b" / "1.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    put(tmp_path / "b" / "0.TXT", "")
    put(tmp_path / "b" / "deep" / "2.txt", '{"text": "no"}\n')
    assert texts_of(tmp_path / "b") == ["", "one\ntwo\nthree\n", '{"text": "no"}\n']
    assert texts_of(tmp_path / "b" / "1.txt") == ["one\ntwo\nthree\n"]


def refused(source: Path | str, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        load_documents(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": null}', "'text' is null"),
        ('{"txt": "a"}', "no field 'text'; its fields are txt"),
        ("{}", "no field 'text'; its fields are none"),
        ('{"text": 7.5}', "'text' is float, not text"),
        ('{"text": true}', "'text' is bool, not text"),
        ('{"text": ["a"]}', "'text' is list, not text"),
        ('{"text": "a', "not JSON"),
        ('{"text": "a"}{"text": "b"}', "not JSON"),
        ('{"text": "a", "text": "b"}', "the field 'text' twice"),
        ('{"text": "a", "meta": {"k": 1, "k": 2}}', "the field 'k' twice"),
        ('["a"]', "not a JSON object"),
        ('{"text": "\\ud83d"}', "'text' has half a surrogate pair"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        ("[" * 50_000, "not JSON"),
    ],
)
def test_a_row_without_text_is_named(row: str | bytes, reason: str, tmp_path: Path) -> None:
    content = row if isinstance(row, bytes) else row.encode()
    file = put(tmp_path / "rows.jsonl", lines(TEXTS[:4]).encode() + b"\n" + content + b"\n" + lines(TEXTS[4:]).encode())
    message = refused(file)
    assert message.startswith(f"1 of 6 rows of {file} cannot be used, more than max_unusable_fraction 0 bears: ")
    assert f"{file} line 6: " in message and reason in message
    assert refused(file, max_unusable_fraction=0.1)
    with pytest.warns(UserWarning, match=r"1 of 6 rows of .*rows\.jsonl cannot be used and were left out: .* line 6"):
        assert texts_of(file, max_unusable_fraction=0.2) == TEXTS


def test_rows_of_a_table_without_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), file)
    assert f"{file} row 2: 'text' is null" in refused(file)
    # Bytes that are no UTF-8, in a column that says it is text.
    wrong = pyarrow.array([b"a", b"\xff", b"b"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), file)
    assert f"{file} row 2: not UTF-8" in refused(file)
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", b"b"]}), file)
    assert "'text' is bytes, not text (and 1 more)" in refused(file)
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), file)
    assert f"cannot read {file}: it has no column 'text'; its columns are content, id" == refused(file)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, file)
    assert "it has the column 'text' twice" in refused(file)
    whole = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 100] * 100}), whole)
    put(file, whole.getvalue().to_pybytes()[:-20])
    assert f"cannot read {file}: " in refused(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo caf\xe9", r"a\.txt: not UTF-8 in line 2"),
        ("a.txt", "text".encode("utf-16-le"), "has NUL characters"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8 in line 1"),
        ("a.jsonl", lines(TEXTS).encode("utf-16"), r"a\.jsonl is UTF-16 or UTF-32: convert it to UTF-8"),
        ("a.jsonl", lines(TEXTS).encode("utf-16-be"), "not JSON"),
        ("a.jsonl", gzip.compress(lines(TEXTS).encode()), "line 1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS).encode()), r"no \.jsonl, .* or \.txt file; unpack it first"),
        ("a.csv", b"text\na\n", r"a\.csv is no \.jsonl, \.json, \.parquet or \.txt file$"),
        ("a.parquet", lines(TEXTS).encode(), r"cannot read .*a\.parquet"),
        ("a.json", json.dumps({"data": [{"text": "a"}]}).encode(), "no field 'text'; its fields are data"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', r"a\.json is not JSON"),
    ],
)
def test_files_that_are_no_text(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = put(tmp_path / "folder" / name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_documents(str(file))
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    assert str(file.parent) in refused(file.parent)


def test_directories(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for index, text in enumerate(TEXTS):
        put(shards / f"{index}" / "part.jsonl", lines([text]))
    put(shards / "5.jsonl", "")
    put(shards / ".cache" / "old.jsonl", lines(["hidden"]))
    put(shards / "._5.jsonl", b"\x00\x05\x16\x07")
    (shards / "folder.jsonl").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts_of(shards) == TEXTS
    put(shards / "README.md", "about")
    put(shards / "dataset_infos.json", "{}")
    with pytest.warns(UserWarning, match=r"the 6 \.jsonl files are read, and not 2 others, such as README\.md"):
        assert texts_of(shards) == TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), shards / "a.parquet")
    assert refused(shards).endswith("has .parquet and .jsonl files: give a file, or a directory of one kind")
    (shards / "a.parquet").unlink()
    (shards / "6.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert "6.jsonl is a link to nothing" in refused(shards)
    (shards / "6.jsonl").unlink()
    (shards / "7").symlink_to(shards / "0")
    with pytest.warns(UserWarning, match=r"not 3 others, such as 7"):
        assert texts_of(shards) == TEXTS
    assert refused(tmp_path / "shards" / "folder.jsonl").endswith("has no .jsonl, .json, .parquet or .txt file")


@pytest.mark.parametrize("kind", ["dataset", "splits"])
def test_a_dataset_saved_to_disk_is_said(kind: str, tmp_path: Path) -> None:
    data: Any = datasets.Dataset.from_dict({"text": TEXTS})
    (data if kind == "dataset" else datasets.DatasetDict(train=data)).save_to_disk(str(tmp_path / "saved"))
    assert "is a dataset as save_to_disk of `datasets` writes it" in refused(tmp_path / "saved")


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert refused("") == "the source of the data is empty: give a file, a directory or a dataset"
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl is no .jsonl" in refused(tmp_path / "pipe.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "there is no file or directory" in refused(tmp_path / "link")
    assert source_files("some/name") is None


def test_a_column_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", None], "image": [{"bytes": b"none", "path": None}] * 2})
    table = table.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    assert "some/set train row 2: 'text' is null" in refused("some/set")
    table = table.rename_column("text", "content")
    assert refused("some/set") == "some/set train has no column 'text'; its columns are content, image"

    def fail(name: str, split: str) -> None:
        raise datasets.exceptions.DatasetGenerationError("no\nway")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refused("some/set").endswith("neither a file nor a dataset that can be fetched: no way")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(tmp_path / "source" / "data.jsonl", lines([f"{word} = {word} + 1\n" * 20 for word in "abcdefgh"]))


def test_a_source_that_changed_is_not_the_corpus_any_more(source: Path, tmp_path: Path) -> None:
    def prepare(place: Path) -> list[list[int]]:
        return prepare_corpus(tmp_path / f"of {place.name}", 300, source=str(place)).train["input_ids"][:]

    first = prepare(source), prepare(source.parent)
    content = source.read_text(encoding="utf-8")
    put(source, content)
    os.utime(source, (1, 1))  # a copy
    assert (prepare(source), prepare(source.parent)) == first
    put(source, content.replace("a = a", "b = b"))
    for place in (source, source.parent):
        with pytest.raises(ValueError, match=r"source.* has changed since .* was made of it \(data\.jsonl\)"):
            prepare(place)
    put(source, content)
    put(source.parent / "more.jsonl", lines(["more"]))
    assert prepare(source) == first[0]
    with pytest.raises(ValueError, match=r"has changed since .* was made of it \(more\.jsonl\)"):
        prepare(source.parent)
    # What is gone cannot be compared, and is not needed.
    shutil.rmtree(source.parent)
    assert (prepare(source), prepare(source.parent)) == first
    (tmp_path / "of source" / "source.json").unlink()
    assert prepare(source.parent) == first[1]


def other_merges(tokenizer: PreTrainedTokenizerFast, path: Path) -> PreTrainedTokenizerFast:
    """The same vocabulary, and text split differently."""
    tokenizer.save_pretrained(path)
    fields = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    fields["model"]["merges"] = fields["model"]["merges"][:10]
    put(path / "tokenizer.json", json.dumps(fields))
    return PreTrainedTokenizerFast.from_pretrained(str(path))


def test_a_corpus_of_another_tokenizer_is_refused(
    source: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, source=str(source), tokenizer=tiny_tokenizer)
    prepare_corpus(corpus, source=str(source), tokenizer=tiny_tokenizer)
    other = other_merges(tiny_tokenizer, tmp_path / "other")
    assert other.get_vocab() == tiny_tokenizer.get_vocab()
    with pytest.raises(ValueError, match="is a corpus of a tokenizer that reads text differently"):
        prepare_corpus(corpus, source=str(source), tokenizer=other)
    with pytest.raises(ValueError, match="was tokenized with another tokenizer than the model's"):
        calibration_windows(str(corpus), other, 2, 16, seed=0)
    tiny_tokenizer.save_pretrained(tmp_path / "ends")
    ends = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "ends"), eos_token="<|pad|>")
    with pytest.raises(ValueError, match="is a corpus of a tokenizer that reads text differently"):
        prepare_corpus(corpus, source=str(source), tokenizer=ends)


def test_documents_without_a_token_and_special_tokens_in_the_text(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = ["", "one", "<|pad|>", "two<|endoftext|>three", " ", ""]
    documents = load_documents(str(put(tmp_path / "a.jsonl", lines(texts))))
    with pytest.warns(UserWarning) as caught:
        tokens = tokenize(documents, tiny_tokenizer, keep_text=True)
    assert [str(warning.message) for warning in caught] == [
        "2 of 6 documents are empty and left out, such as a.jsonl/0",
        "2 of 6 documents spell special tokens, such as a.jsonl/2 <|pad|>: they are read as these tokens",
    ]
    assert tokens["text"][:] == texts[1:5]
    assert [ids[-1] for ids in tokens["input_ids"]] == [tiny_tokenizer.eos_token_id] * 4
    assert tokens["input_ids"][1] == [1, 0]
    put(tmp_path / "b.jsonl", lines([""] * 5))
    for message, prepare in (
        ("no heldout document of .* has a token", lambda s: prepare_corpus(tmp_path / "c", 300, source=s)),
        ("has 0 tokens, fewer than one window", lambda s: calibration_windows(s, tiny_tokenizer, 2, 16, seed=0)),
    ):
        with pytest.warns(UserWarning, match="are empty"), pytest.raises(ValueError, match=message):
            prepare(str(tmp_path / "b.jsonl"))
    assert not (tmp_path / "c").exists()


def test_text_that_a_tokenizer_cannot_read_is_one_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "one": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    source = put(tmp_path / "a.jsonl", lines(["one", "one two"]))
    with pytest.raises(ValueError, match=r"the tokenizer cannot read a document from a\.jsonl/[01] on"):
        prepare_corpus(tmp_path / "corpus", source=str(source), tokenizer=words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda corpus: shutil.rmtree(corpus / "train"),
        lambda corpus: (corpus / "heldout" / "state.json").unlink(),
        lambda corpus: put(corpus / "train" / "state.json", "{}"),
        lambda corpus: put(corpus / "train" / "state.json", "[1]"),
        lambda corpus: put(corpus / "train" / "dataset_info.json", "{"),
        lambda corpus: _truncate(next((corpus / "train").glob("data-*.arrow"))),
        lambda corpus: put(next((corpus / "heldout").glob("data-*.arrow")), b""),
        lambda corpus: shutil.rmtree(corpus / "tokenizer"),
    ],
)
def test_a_damaged_corpus_is_one_line(damage: Callable[[Path], object], corpus_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_path, corpus)
    damage(corpus)
    with pytest.raises(ValueError, match=str(corpus)) as error:
        load_corpus(corpus)
    assert "\n" not in str(error.value)


def test_a_place_that_datasets_would_mistake(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'::' in it"):
        prepare_corpus(tmp_path / "a::b", 300, source=str(source))
    made = prepare_corpus(tmp_path / "a[1]*" / "c?", 300, source=str(source))
    assert len(load_corpus(tmp_path / "a[1]*" / "c?").train) == len(made.train) == 7


def test_a_hopeless_source_is_not_read_to_its_end(tmp_path: Path) -> None:
    source = tmp_path / "other.jsonl"
    source.write_text('{"body": "x"}\n' * 3000)
    with pytest.raises(ValueError, match=r"1000 of 1000 rows of .* cannot be used"):
        load_documents(str(source))
    with pytest.raises(ValueError, match=r"3000 of 3000 rows"):  # a share is of all
        load_documents(str(source), 0.5)

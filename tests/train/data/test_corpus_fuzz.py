"""Mutated corpora end in the text that a simple reading finds, or in one clear line.

SPEEDSTACK_NUM_FUZZED limits how many are tried; a failure names its number, from which everything about it follows.
"""

import gzip
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from speedstack.cli import main
from speedstack.train.data.corpus import prepare_corpus
from speedstack.train.data.documents import load_documents

NUM_FUZZED = int(os.environ.get("SPEEDSTACK_NUM_FUZZED", "200"))
WORDS = [
    "alpha",
    "beta = 1",
    "\u00e9t\u00e9",
    "\u2028",
    "\x85",
    "\U0001f600",
    "\ttab",
    "line\nline",
    "\r\n",
    '"quoted"',
]
NAMES = [
    "data",
    "da[t]a",
    "data*",
    "da?a",
    "~data",
    "da ta",
    "da::ta",
    "%64ata",
    "{data}",
    "#data",
    "d\u00e4ta",
    "data.v2",
]

Mutation = Callable[[random.Random, Path, list[str]], Path]


def texts_of(rng: random.Random) -> list[str]:
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 40))) for _ in range(rng.randrange(2, 12))]


def rows_of(rng: random.Random, texts: list[str]) -> list[str]:
    """Lines of JSON, as different writers spell them."""
    rows = []
    for text in texts:
        row = {"id": rng.randrange(9), "text": text, "meta": {"tags": ["a", None]}}
        fields = rng.sample(sorted(row), 3)
        rows.append(json.dumps({field: row[field] for field in fields}, ensure_ascii=rng.random() < 0.5))
    return rows


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def bytes_of(rng: random.Random, texts: list[str]) -> bytes:
    return "".join(row + "\n" for row in rows_of(rng, texts)).encode()


# Files in which bytes are wrong.


def truncated(rng: random.Random, place: Path, texts: list[str]) -> Path:
    content = bytes_of(rng, texts)
    return write(place / "data.jsonl", content[: rng.randrange(len(content))])


def flipped(rng: random.Random, place: Path, texts: list[str]) -> Path:
    content = bytearray(bytes_of(rng, texts))
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return write(place / "data.jsonl", bytes(content))


def cut_out(rng: random.Random, place: Path, texts: list[str]) -> Path:
    content = bytes_of(rng, texts)
    start = rng.randrange(len(content))
    return write(place / "data.jsonl", content[:start] + content[start + rng.randrange(1, 30) :])


def encoded(rng: random.Random, place: Path, texts: list[str]) -> Path:
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "utf-7", "cp037"])
    content = bytes_of(rng, texts).decode().encode(encoding, errors="replace")
    return write(place / rng.choice(["data.jsonl", "data.txt", "data.json"]), content)


def mixed_encodings(rng: random.Random, place: Path, texts: list[str]) -> Path:
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in [*texts, "na\u00efve"]]
    return write(
        place / "data.jsonl", b"\n".join(row.encode(rng.choice(["utf-8", "cp1252"]), "replace") for row in rows)
    )


def line_ends(rng: random.Random, place: Path, texts: list[str]) -> Path:
    end = rng.choice(["\r\n", "\n\n\n", "\n \t\n", "\r", "\n\x0c\n", "\n\ufeff"])
    return write(place / "data.jsonl", end.join(rows_of(rng, texts)))


# Rows that say something else.


def odd_row(rng: random.Random, place: Path, texts: list[str]) -> Path:
    odd = rng.choice(
        [
            '{"text": null}', '{"text": 1}', '{"text": false}', '{"text": NaN}', '{"text": {"text": "a"}}',
            '{"text": ["a"]}', '{"Text": "a"}', '{"content": "a"}', "{}", "[]", "null", '"text"', "7", "nul", "{",
            '{"text": "a"},', "{'text': 'a'}", '{"text": "a"} // no', '{"text": "a"}{"text": "b"}', '{"text": "a\tb"}',
            '{"text": "a", "text": "b"}', '{"text": "a", "text": null}', '{"text": "\\ud800"}', '{"text": "\\udc00a"}',
            '{"text": "\\u0000"}', '{"text": "\\x41"}', '{"text": ""}', '{"text": "a", "n": NaN}', '{"text" "a"}',
            '{"text": "a", "n": 1e999}', '{"text": "a", "n": ' + "9" * 5000 + "}", "[" * 3000 + "]" * 3000,
            '{"text": "a", "n": ' + "[" * 100 + "]" * 100 + "}", '{"text": "' + "long " * 200_000 + '"}',
            '\ufeff{"text": "a"}', '\x00{"text": "a"}', '{"text": "a"}\x1e', "NaN", '{"text": "\\ud83d\\ude00"}',
        ]
    )  # fmt: skip
    rows = rows_of(rng, texts)
    rows.insert(rng.randrange(len(rows) + 1), odd)
    return write(place / "data.jsonl", "\n".join(rows))


def dropped_key(rng: random.Random, place: Path, texts: list[str]) -> Path:
    rows = [json.loads(row) for row in rows_of(rng, texts)]
    del rng.choice(rows)[rng.choice(["text", "id", "meta"])]
    return write(place / "data.jsonl", "\n".join(json.dumps(row) for row in rows))


def whole_json(rng: random.Random, place: Path, texts: list[str]) -> Path:
    rows: Any = [{"text": text} for text in texts]
    rows = rng.choice([rows, rows[0], {"data": rows}, {"text": texts}, [], {}, [rows], [*rows, None], texts])
    content = json.dumps(rows, indent=rng.choice([None, 1]))
    return write(place / "data.json", content[: rng.choice([len(content), -1, len(content) // 2])])


# Names, kinds and places.


def odd_name(rng: random.Random, place: Path, texts: list[str]) -> Path:
    for decoy in ("data", "dat", "a", "daxa", "dataa"):
        write(place / f"{decoy}.jsonl", '{"text": "not this one"}\n' * 3)
    return write(
        place / rng.choice(NAMES) / f"{rng.choice(NAMES)}.{rng.choice(['jsonl', 'JSONL', 'json'])}",
        bytes_of(rng, texts),
    )


def wrong_suffix(rng: random.Random, place: Path, texts: list[str]) -> Path:
    content = bytes_of(rng, texts)
    if rng.random() < 0.5:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
        content = sink.getvalue().to_pybytes()
    if rng.random() < 0.2:
        content = gzip.compress(content)
    suffix = rng.choice([".jsonl", ".json", ".parquet", ".txt", ".csv", ".jsonl.gz", "", ".arrow"])
    return write(place / f"data{suffix}", content)


def empty(rng: random.Random, place: Path, texts: list[str]) -> Path:
    content = rng.choice([b"", b"\n", b"\xef\xbb\xbf", b" \r\n\r\n", b"\x00" * 10])
    return write(place / f"data{rng.choice(['.jsonl', '.json', '.parquet', '.txt'])}", content)


def text_files(rng: random.Random, place: Path, texts: list[str]) -> Path:
    for index, text in enumerate(texts):
        write(place / "texts" / f"{index:02}{rng.choice(['.txt', '.TXT'])}", text)
    if rng.random() < 0.5:
        write(
            place / "texts" / f"{rng.choice(NAMES)}.txt",
            rng.choice([b"caf\xe9", b"a\x00b\x00", b"", b"\xef\xbb\xbfa\r\nb"]),
        )
    return place / "texts"


def table(rng: random.Random, place: Path, texts: list[str]) -> Path:
    other = rng.randrange(len(texts))
    columns: list[Any] = [
        texts, [None, *texts[1:]], [text.encode() for text in texts], list(range(len(texts))), [[t] for t in texts],
        pyarrow.array(texts, pyarrow.large_string()), pyarrow.array(texts).dictionary_encode(), [None] * len(texts),
        pyarrow.array([b"\xff" if i == other else t.encode() for i, t in enumerate(texts)]).view(pyarrow.string()),
    ]  # fmt: skip
    data = pyarrow.table(
        {rng.choice(["text", "text", "text", "txt"]): rng.choice(columns), "id": list(range(len(texts)))}
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(data, sink, row_group_size=3, write_page_checksum=True)
    content = sink.getvalue().to_pybytes()
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content))]
    return write(place / rng.choice(["data.parquet", "da[t]a.parquet"]), content)


def directory(rng: random.Random, place: Path, texts: list[str]) -> Path:
    root, half = place / rng.choice(NAMES), len(texts) // 2
    write(root / rng.choice(["a.jsonl", "sub/a.jsonl", "a.jsonl/a.jsonl"]), bytes_of(rng, texts[:half]))
    write(root / rng.choice(["b.jsonl", "z/b.JSONL", ".b.jsonl", ".git/b.jsonl", "b.txt"]), bytes_of(rng, texts[half:]))
    if (
        extra := rng.choice([None, "README.md", "README.txt", "infos.json", "c.jsonl", "c.parquet", "c.arrow", "c.csv"])
    ) is not None:
        write(root / extra, b"")
    return root


MUTATIONS: list[Mutation] = [
    truncated, flipped, flipped, flipped, cut_out, encoded, mixed_encodings, line_ends, odd_row, odd_row,
    odd_row, odd_row, dropped_key, whole_json, odd_name, odd_name, wrong_suffix, wrong_suffix, empty, text_files, table,
    table, directory, directory,
]  # fmt: skip


class Unclear(Exception):
    """The simple reading finds no texts."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Unclear
    return dict(pairs)


def simple_file(file: Path) -> list[str]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        rows: list[Any] = pyarrow.parquet.read_table(
            pyarrow.BufferReader(file.read_bytes()), columns=["text"]
        ).to_pylist()
    else:
        content = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
        if suffix == ".txt":
            if "\0" in content:
                raise Unclear
            return ["\n".join(content.replace("\r\n", "\n").split("\r"))]
        try:
            assert suffix == ".json"
            whole = json.loads(content, object_pairs_hook=unique)
            rows = whole if isinstance(whole, list) else [whole]
        except (ValueError, AssertionError):
            rows = [
                json.loads(line, object_pairs_hook=unique)
                for line in content.split("\n")
                if line.strip(" \t\r\n\x0b\x0c")
            ]
    texts = [row["text"] for row in rows]
    for text in texts:
        text.encode("utf-8").decode("utf-8")
    return texts


def simple(source: Path) -> list[str]:
    """The texts of a source, by another way, or any exception."""
    if source.is_file():
        files = [source]
    else:
        found = sorted(Path(top) / name for top, _, names in os.walk(source) for name in names)
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(source).parts)]
        kinds = {file.suffix.lower() for file in found} & {".jsonl", ".json", ".parquet", ".txt"}
        if {".jsonl", ".parquet"} <= kinds or any(file.suffix == ".arrow" for file in found):
            raise Unclear
        kind = next(kind for kind in (".parquet", ".jsonl", ".json", ".txt") if kind in kinds)
        files = [file for file in found if file.suffix.lower() == kind]
    if any(file.suffix.lower() not in (".jsonl", ".json", ".parquet", ".txt") for file in files):
        raise Unclear
    return [text for file in files for text in simple_file(file)]


def expected(source: Path) -> list[str] | None:
    try:
        return simple(source)
    except Exception:  # of any kind, for it is to be refused
        return None


@pytest.mark.parametrize("part", range(4))
def test_mutated_corpora(part: int, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    warnings.simplefilter("ignore", UserWarning)
    num_read = num_refused = 0
    for number in range(part, NUM_FUZZED, 4):
        rng = random.Random(number)
        mutate = MUTATIONS[number % len(MUTATIONS)]
        source = mutate(rng, tmp_path / str(number), texts_of(rng))
        texts, where = expected(source), f"number {number}, {mutate.__name__}: {source}"
        try:
            found = load_documents(str(source))["text"][:]
        except ValueError as error:
            assert texts is None, f"{where} is refused: {error}"
            assert "\n" not in str(error) and str(source) in str(error), where
            num_refused += 1
            # The same through the command, which reads it before it loads the model.
            out = tmp_path / "out"
            assert (
                main(["quantize", str(tiny_model_dir), "--calibration.source", str(source), "--out", str(out)]) == 2
            ), where
            said = capsys.readouterr().err
            assert said.count("speedstack: error: ") == 1 and "Traceback" not in said and not out.exists(), where
            continue
        assert texts is not None and found == texts, where
        num_read += 1
        if len(texts) >= 2 and num_read % 3 == 0:
            check_corpus(tmp_path / f"corpus-{number}", source, texts)
    assert (num_read and num_refused) or NUM_FUZZED < 200


def check_corpus(path: Path, source: Path, texts: list[str]) -> None:
    corpus = prepare_corpus(path, 300, source=str(source), heldout_fraction=0.3)
    parts = (corpus.train, corpus.heldout)
    decoded = [corpus.tokenizer.decode(ids[:-1]) for part in parts for ids in part["input_ids"]]
    assert sorted(decoded) == sorted(text for text in texts if text), source

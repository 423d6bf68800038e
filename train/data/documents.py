"""Documents of a text source: files, a data set of the Hugging Face Hub, or the running interpreter's own library.

Files are opened here, by exact path: no glob pattern, no stale cache. Text passes through a temporary file, not memory.
"""

from __future__ import annotations

import sysconfig
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from speedstack.eval.data.rows import RowTally, UnusableRow, read_file, read_hub, source_files
from speedstack.support.digests import file_sha256

STDLIB = "stdlib"
TEXT_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_COLUMN = "text"
# Tests and foreign packages; the modules of `encodings` are tables of characters, not code.
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
_MIN_DOCUMENT_CHARACTERS = 200
_MAX_TEXT_BYTES = 2**31 - 2  # limit of one string in Arrow
_BATCH_CHARACTERS, _BATCH_ROWS = 16 << 20, 10_000
_TOO_LONG = "2 GiB of text or more"
_NUM_NAMES = 8
_HOPELESS = 1000  # unusable rows after which reading stops instead of counting them all


def load_documents(source: str, max_unusable_fraction: float = 0.0) -> datasets.Dataset:
    """Columns `name` and `text` of the documents, in an order that depends on the source alone.

    `source` is "stdlib"; a .jsonl, .json or .parquet file with a column `text`; a .txt file, which is one document; a
    directory of such files, read as by `speedstack.eval.data.rows.source_files`; or a name on the Hub. A share of rows
    up to `max_unusable_fraction` may lack text; a warning counts them. Raises ValueError for an unreadable source or
    too many such rows, OSError for no room for temporary files.
    """
    tally = RowTally(source, max_unusable_fraction)
    with tempfile.TemporaryDirectory(prefix="speedstack-documents-", ignore_cleanup_errors=True) as directory:
        file = str(Path(directory) / "documents.arrow")
        _write(file, _documents(source, tally))
        tally.check()
        # Memory-mapped, so the data outlive the deleted file name.
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()
    if summary := tally.summary():
        warnings.warn(summary, stacklevel=2)
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=uuid.uuid4().hex)


def describe_files(source: str) -> dict[str, dict[str, Any]] | None:
    """Relative path -> size, time and SHA-256 of each source file; None for a source without files."""
    files = None if source == STDLIB else source_files(source, TEXT_SUFFIXES)
    return None if files is None else {_below(source, file): _describe(file) for file in files}


def changed_file(source: str, described: dict[str, dict[str, Any]] | None) -> str | None:
    """The first file that differs from `describe_files`' record; None if none does, or the source is gone.

    Contents decide; a file is read only if its size or time differs.
    """
    if described is None or not Path(source).exists():
        return None
    files = {_below(source, file): file for file in source_files(source, TEXT_SUFFIXES) or ()}
    for name in sorted(files.keys() ^ described.keys()):
        return name
    for name, file in files.items():
        status, before = file.stat(), described[name]
        is_same = status.st_size == before["num_bytes"] and status.st_mtime_ns == before["mtime_ns"]
        if not is_same and _describe(file)["sha256"] != before["sha256"]:
            return name
    return None


def _below(source: str, file: Path) -> str:
    return file.relative_to(source).as_posix() if Path(source).is_dir() else file.name


def _describe(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_sha256(file)}


def _documents(source: str, tally: RowTally) -> Iterator[tuple[str, str]]:
    """Name and text of each document."""
    index = 0
    for where, text in _texts(source):
        tally.num_rows += 1
        if isinstance(text, UnusableRow):
            tally.unusable.append(text)
            if tally.max_unusable_fraction == 0 and len(tally.unusable) == _HOPELESS:
                tally.check()
            continue
        yield where if source == STDLIB else f"{Path(source).name}/{index}", text
        index += 1


def _texts(source: str) -> Iterator[tuple[str, str | UnusableRow]]:
    """Where a text is, and the text or why there is none."""
    if source == STDLIB:
        yield from _standard_library()
        return
    files = source_files(source, TEXT_SUFFIXES)
    if files is not None and files[0].suffix.lower() == ".txt":
        yield from ((str(file), _read_text(file)) for file in files)
        return
    rows = read_hub(source, "train", _COLUMN) if files is None else (r for f in files for r in read_file(f, _COLUMN))
    for where, row in rows:
        yield where, row if isinstance(row, UnusableRow) else _text_of(where, row)


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if _SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            warnings.warn(f"left {file} out of the corpus: {error}", stacklevel=2)
            continue
        if len(text) >= _MIN_DOCUMENT_CHARACTERS:
            yield relative.as_posix(), text


def _read_text(file: Path) -> str | UnusableRow:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return UnusableRow(str(file), f"not UTF-8 in line {line}")
    if "\0" in text:
        return UnusableRow(str(file), "has NUL characters, as UTF-16 has and text has not")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if len(content) <= _MAX_TEXT_BYTES else UnusableRow(str(file), _TOO_LONG)


def _text_of(where: str, row: dict[str, Any]) -> str | UnusableRow:
    if _COLUMN not in row:
        names = ", ".join(list(row)[:_NUM_NAMES]) or "none"
        return UnusableRow(where, f"no field '{_COLUMN}'; its fields are {names}{' ...' * (len(row) > _NUM_NAMES)}")
    text = row[_COLUMN]
    if not isinstance(text, str):
        return UnusableRow(where, f"'{_COLUMN}' is {'null' if text is None else f'{type(text).__name__}, not text'}")
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return UnusableRow(where, f"'{_COLUMN}' has half a surrogate pair")
    return text if num_bytes <= _MAX_TEXT_BYTES else UnusableRow(where, _TOO_LONG)


def _write(file: str, documents: Iterable[tuple[str, str]]) -> None:
    schema = pyarrow.schema([("name", pyarrow.string()), (_COLUMN, pyarrow.string())])
    batch: list[tuple[str, str]] = []
    num_characters = 0
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:

        def flush() -> None:
            names, texts = zip(*batch, strict=True) if batch else ((), ())
            writer.write_batch(pyarrow.record_batch([list(names), list(texts)], schema=schema))
            batch.clear()

        for name, text in documents:
            if num_characters + len(text) > _BATCH_CHARACTERS or len(batch) == _BATCH_ROWS:
                flush()
                num_characters = 0
            batch.append((name, text))
            num_characters += len(text)
        flush()

"""Rows of public data: files and data sets read in one way, and counts of unusable rows.

An unusable row, such as a broken line, is left out, counted and named; it ends a job only beyond the config's limit.
`chats.py` reads a row's content.
"""

from __future__ import annotations

import codecs
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
# Only one kind is read of a directory. Data sets bring .json descriptions and a README.txt.
_PREFERENCE = (".parquet", ".jsonl", ".json", ".txt")
# Marks the directory of a prepared corpus.
CORPUS_FILE = "corpus.json"
_NUM_EXAMPLES = 3
_BATCH_ROWS = 256


class UnusableRow(ValueError):
    """An unusable row: `where` it is, and the `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


# Where the row is, for errors; and its fields, or why it is unusable.
Row = tuple[str, dict[str, Any] | UnusableRow]


@dataclass
class RowTally:
    """Counts of the rows read from `source`.

    `unusable` rows are faults of the data, tolerated up to `max_unusable_fraction`; `left_out` counts, by reason, rows
    that do not fit the settings.
    """

    source: str
    max_unusable_fraction: float
    num_rows: int = 0
    unusable: list[UnusableRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def check(self) -> None:
        """Raise ValueError for too many unusable rows."""
        if len(self.unusable) > self.max_unusable_fraction * self.num_rows:
            raise ValueError(
                f"{self._num_unusable()}, more than max_unusable_fraction {self.max_unusable_fraction:g} bears: "
                f"{self._examples()}"
            )

    def summary(self) -> str:
        """How many rows were left out and why, or an empty string."""
        parts = [f"{self._num_unusable()} and were left out: {self._examples()}"] if self.unusable else []
        if self.left_out:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.left_out.items()))
            parts.append(f"of {self.num_rows} rows of {self.source} left out: {reasons}")
        return "; ".join(parts)

    def _num_unusable(self) -> str:
        return f"{len(self.unusable)} of {self.num_rows} rows of {self.source} cannot be used"

    def _examples(self) -> str:
        """The first row of each of the first kinds of fault."""
        counts = Counter(row.reason for row in self.unusable)
        first = {row.reason: row for row in reversed(self.unusable)}
        kinds = [f"{first[reason]}{f' (and {n - 1} more)' if n > 1 else ''}" for reason, n in counts.items()]
        more = len(kinds) - _NUM_EXAMPLES
        return "; ".join(kinds[:_NUM_EXAMPLES]) + (f"; and {more} other reasons" if more > 0 else "")


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """All rows of `iter_rows`."""
    return list(iter_rows(source, split))


def iter_rows(source: str | Path, split: str = "train", column: str | None = None) -> Iterator[Row]:
    """Rows of a .jsonl, .json or .parquet file, a directory of such files (`source_files`), or a Hub data set.

    A .json is one array, one object, or like a .jsonl. Files have no splits. `column`: the only column to read of a
    table. Raises ValueError for an unreadable source and a table without `column`; a line without a JSON object is an
    unusable row.
    """
    if Path(source).exists() and split != "train":
        raise ValueError(f"{source} is a file or directory, which has no split '{split}': leave the split out")
    files = source_files(source)
    if files is None:
        yield from read_hub(str(source), split, column)
        return
    for file in files:
        yield from read_file(file, column)


def source_files(source: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path] | None:
    """The files of a source, in order; None for the name of a Hub data set.

    A directory gives all files of one kind, recursively, without hidden ones; a warning names the others. Paths are
    literal. Raises ValueError for a missing file or directory, or one of another or several kinds.
    """
    if not str(source):
        raise ValueError("the source of the data is empty: give a file, a directory or a dataset")
    place = Path(source)
    if place.is_dir():
        return _files_of(place, suffixes)
    if not place.exists():
        known = (*_PREFERENCE, *SUFFIXES, *suffixes)
        if place.suffix.lower() in known or str(source).startswith(("/", "./", "../", "~")) or place.is_symlink():
            raise ValueError(f"there is no file or directory {source}")  # not on the Hub either, after many retries
        return None
    if not place.is_file() or place.suffix.lower() not in suffixes:
        raise ValueError(f"{place} is no {_listed(suffixes)} file{_unpack([place])}")
    return [place]


def read_file(file: Path, column: str | None = None) -> Iterator[Row]:
    """Rows of one file; see `iter_rows`."""
    return _read_parquet(file, column) if file.suffix.lower() == ".parquet" else _read_json(file)


def _files_of(directory: Path, suffixes: Sequence[str]) -> list[Path]:
    entries = sorted(
        entry
        for entry in directory.rglob("*")
        if not any(part.startswith(".") for part in entry.relative_to(directory).parts)
    )
    # A corpus prepared from a directory, inside it.
    prepared = {entry.parent for entry in entries if entry.name == CORPUS_FILE} - {directory}
    entries = [entry for entry in entries if not prepared & {entry, *entry.parents}]
    lost = [entry for entry in entries if entry.is_symlink() and not entry.exists()]
    if lost:
        raise ValueError(f"{lost[0]} is a link to nothing: download or remove it")
    # pathlib does not enter linked directories; they are reported.
    files = [entry for entry in entries if not entry.is_dir() or entry.is_symlink()]
    by_kind = {
        kind: [file for file in files if file.suffix.lower() == kind] for kind in _PREFERENCE if kind in suffixes
    }
    kinds = [kind for kind, members in by_kind.items() if members]
    if any(file.suffix == ".arrow" for file in files):
        raise ValueError(
            f"{directory} is a dataset as save_to_disk of `datasets` writes it: write it with its to_json or to_parquet"
        )
    if not kinds:
        raise ValueError(f"{directory} has no {_listed(suffixes)} file{_unpack(files)}")
    if {".parquet", ".jsonl"} <= set(kinds):
        raise ValueError(f"{directory} has .parquet and .jsonl files: give a file, or a directory of one kind")
    chosen = by_kind[kinds[0]]
    others = [file for file in files if file not in set(chosen)]
    if others:
        warnings.warn(
            f"of {directory} the {len(chosen)} {kinds[0]} files are read, and not {len(others)} others, such as "
            f"{others[0].relative_to(directory)}",
            stacklevel=2,
        )
    return chosen


def _listed(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _unpack(files: Sequence[Path]) -> str:
    is_packed = any(file.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz") for file in files)
    return "; unpack it first" if is_packed else ""


def _read_parquet(file: Path, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with file.open("rb") as stream:  # opened here, because pyarrow takes some names for URLs
            table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            names = table.schema_arrow.names
            if twice := next((name for name, n in Counter(names).items() if n > 1), None):
                raise ValueError(f"it has the column '{twice}' twice")
            _check_column("it", names, column)
            for batch in table.iter_batches(_BATCH_ROWS, columns=None if column is None else [column]):
                for row in _batch_rows(batch):
                    number += 1
                    where = f"{file} row {number}"
                    yield where, row if isinstance(row, dict) else UnusableRow(where, row)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {file}: {_one_line(error)}") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Rows of an Arrow batch or table, or why a row is unusable."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                yield "not UTF-8"


def _check_column(where: str, names: Sequence[str], column: str | None) -> None:
    if column is not None and column not in names:
        raise ValueError(f"{where} has no column '{column}'; its columns are {', '.join(names) or 'none'}")


def _read_json(file: Path) -> Iterator[Row]:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
            stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                raise ValueError(f"{file} is UTF-16 or UTF-32: convert it to UTF-8")
            if file.suffix.lower() == ".json" and (items := _whole(file, stream.read())) is not None:
                yield from (_row(f"{file} row {number}", item) for number, item in enumerate(items, start=1))
                return
            stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            for number, line in enumerate(stream, start=1):  # ends at b"\n" alone: a string may hold other line ends
                if line.strip():
                    where = f"{file} line {number}"
                    try:
                        yield _row(where, _parsed(line))
                    except UnicodeDecodeError:
                        yield where, UnusableRow(where, "not UTF-8")
                    except (ValueError, RecursionError) as error:
                        yield where, UnusableRow(where, f"not JSON ({error})")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error


def _whole(file: Path, content: bytes) -> list[Any] | None:
    """Rows of a file that is one array or object; None for JSON lines."""
    try:
        value = _parsed(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"[":
            raise ValueError(f"{file} is not JSON: {error}") from error
        return None
    return value if isinstance(value, list) else [value]


def _parsed(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object. Raises ValueError for a repeated name, which readers resolve differently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"the field {twice!r} twice")
    return value


def _row(where: str, item: Any) -> Row:
    return where, item if isinstance(item, dict) else UnusableRow(where, "not a JSON object")


def read_hub(name: str, split: str, column: str | None = None) -> Iterator[Row]:
    """Rows of a Hub data set; see `iter_rows`."""
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # errors of datasets, pyarrow and downloads share no base class
        raise ValueError(
            f"source {name} is neither a file nor a dataset that can be fetched: {_one_line(error)}"
        ) from error
    _check_column(f"{name} {split}", table.column_names, column)
    if column is not None:
        table = table.select_columns([column])
    number = 0
    # In Arrow's form: images and sounds are not decoded.
    for batch in table.with_format("arrow").iter(_BATCH_ROWS):
        for row in _batch_rows(batch):
            number += 1
            where = f"{name} {split} row {number}"
            yield where, row if isinstance(row, dict) else UnusableRow(where, row)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

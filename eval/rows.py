"""Rows of people's data: files and data sets read in one way, and what becomes of rows that cannot be used.

Public data is dirty. A row that cannot be used is left out, counted and named, and ends a job only where such rows are
more than the job's config bears: a broken line is a row too. `chats.py` says what a row holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
_NUM_EXAMPLES = 3


class UnusableRow(ValueError):
    """A row of which nothing can be made: `where` it stands, and the `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


# Where it stands, for errors; and its fields, or why it has none.
Row = tuple[str, dict[str, Any] | UnusableRow]


@dataclass
class RowTally:
    """What became of the rows of `source` that were looked at.

    `unusable` rows are faults of the data, of which `max_unusable_fraction` is borne; `left_out` counts, by reason, the
    rows that do not fit the settings.
    """

    source: str
    max_unusable_fraction: float
    num_rows: int = 0
    unusable: list[UnusableRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def check(self) -> None:
        """Raises ValueError where more rows cannot be used than are borne."""
        if len(self.unusable) > self.max_unusable_fraction * self.num_rows:
            raise ValueError(
                f"{self._num_unusable()}, more than max_unusable_fraction {self.max_unusable_fraction:g} bears: "
                f"{self._examples()}"
            )

    def summary(self) -> str:
        """How many rows were left out and why; empty where none was."""
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
    """Rows of a .jsonl, .json or .parquet file, of a directory of such files, or of a data set of the Hugging Face Hub.

    A .json is one array, or as a .jsonl; of a directory the parquet files are read, or where it has none the .jsonl, or
    the .json. Files have no splits. Raises ValueError, one line, for a source that is not there or cannot be read; a
    line that is no JSON object is a row that cannot be used.
    """
    place = Path(source)
    if place.exists() and split != "train":
        raise ValueError(f"{place} is a file or directory, which has no split '{split}': leave the split out")
    if place.is_dir():
        files = _files_of(place)
        return [row for file in files for row in _read_file(file)]
    if place.exists() or place.suffix in SUFFIXES or str(source).startswith(("/", "./", "../", "~")):
        return list(_read_file(place))  # nor would the Hub have it, after many retries
    return _read_hub(str(source), split)


def _files_of(directory: Path) -> list[Path]:
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    # Data sets bring .json files that describe them.
    for suffix in (".parquet", ".jsonl", ".json"):
        if found := [file for file in files if file.suffix == suffix]:
            return found
    raise ValueError(f"{directory} has no .jsonl, .json or .parquet file")


def _read_file(file: Path) -> Iterator[Row]:
    if not file.is_file():
        raise ValueError(f"there is no file or directory {file}")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} is no .jsonl, .json or .parquet file")
    return _read_parquet(file) if file.suffix == ".parquet" else _read_json(file)


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    return ((f"{file} row {number}", row) for number, row in enumerate(rows, start=1))


def _read_json(file: Path) -> Iterator[Row]:
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
    if content.lstrip()[:1] == b"[" and file.suffix == ".json":
        try:
            items = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        for number, item in enumerate(items, start=1):
            yield _row(f"{file} row {number}", item)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):  # a string may hold other line ends
        if line.strip():
            where = f"{file} line {number}"
            try:
                yield _row(where, json.loads(line.decode("utf-8")))
            except UnicodeDecodeError:
                yield where, UnusableRow(where, "not UTF-8")
            except (ValueError, RecursionError) as error:
                yield where, UnusableRow(where, f"not JSON ({error})")


def _row(where: str, item: Any) -> Row:
    return where, item if isinstance(item, dict) else UnusableRow(where, "not a JSON object")


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    try:
        # As Arrow gives them: images and sounds stay as they are stored.
        rows = datasets.load_dataset(name, split=split).with_format("arrow")[:].to_pylist()
    except Exception as error:  # of datasets, pyarrow and what fetches files, which share no base class
        reason = " ".join(str(error).split())
        raise ValueError(f"source {name} is neither a file nor a dataset that can be fetched: {reason}") from error
    return [(f"{name} {split} row {number}", row) for number, row in enumerate(rows, start=1)]

"""Data sets of lm-eval's tasks from local files instead of the Hugging Face Hub, one file per split:

    DIRECTORY/<data set>/<configuration, or "default">/<split>.jsonl        (or .parquet)
    DIRECTORY/openai/gsm8k/main/test.jsonl

lm-eval has no setting for this, so the one function that loads data sets is replaced while tasks are loaded.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

FORMATS = {".jsonl": "json", ".parquet": "parquet"}


@contextmanager
def local_data(directory: Path | None) -> Iterator[None]:
    """Within the block data sets come from `directory` if it has them, else from the Hub.

    Raises ValueError for an unreadable file and, naming the missing files, for a data set that neither has.
    """
    load_from_hub = datasets.load_dataset

    def read(file: Path) -> datasets.Dataset:
        try:  # `datasets` takes a path for a pattern
            return load_from_hub(FORMATS[file.suffix], data_files=glob.escape(str(file)), split="train")
        except Exception as error:  # errors of datasets and pyarrow share no base class
            reason = error.__cause__ or error
            raise ValueError(f"cannot read {file}: {' '.join(str(reason).split())}") from error

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in FORMATS.values():
            return load_from_hub(path, name, **options)
        if directory is not None and (files := split_files(directory, path, name)):
            return datasets.DatasetDict({split: read(file) for split, file in files.items()})
        try:
            return load_from_hub(path, name, **options)
        # Whatever the cause (no network, offline mode, a renamed or gated data set, a full disk), local files help.
        except Exception as error:
            place = data_place(directory or Path("DIR"), path, name)
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            raise ValueError(
                f"data set {path}{f' ({name})' if name else ''} could not be loaded from the Hub ({reason}). Without a "
                f"network, give --data DIR with a file for each split that the task reads: {place}/test.jsonl, and "
                "train or validation likewise (.parquet will do too)"
            ) from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = load_from_hub


def data_place(directory: Path, path: str, name: str | None) -> Path:
    """The directory of a configuration's splits."""
    return directory / path / (name or "default")


def split_files(directory: Path, path: str, name: str | None) -> dict[str, Path]:
    """Split -> file, for existing splits."""
    files = sorted(data_place(directory, path, name).glob("*.*"))
    return {file.stem: file for file in files if file.suffix in FORMATS}

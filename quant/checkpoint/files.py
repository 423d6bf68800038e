"""Files of a Hugging Face directory: config.json, and safetensors in one file or in shards with an index.

Defects from downloads, full disks or typing errors become one-line ValueErrors before any computation. Tensors, or
slices of the first dimension, are read on demand into their own memory: a view of a mapped file would change or crash
if the file is overwritten, and its pages would count as the process's memory.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


class ReadError(OSError):
    """A file cannot be read; distinct from errors about files to be written."""


def checkpoint_directory(path: str | Path) -> Path:
    """Raises ValueError unless `path` is a directory."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no model directory at {path}: give the path of a directory that holds {CONFIG_FILE}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a missing file or no JSON object, ReadError if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: is {path.parent} a Hugging Face model directory?") from error
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): write or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} instead of an object: download it again")
    return value


def weight_files(path: str | Path) -> list[Path]:
    """A model directory's safetensors files, sorted by name.

    Raises ValueError if there are none, if an indexed one is missing, and for a single file beside shards, because
    loaders disagree on which to read.
    """
    path = checkpoint_directory(path)
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).is_symlink() and not (path / name).exists():
            raise ValueError(f"{path / name} is a link to nothing: download it again")
    if (path / SINGLE_FILE).is_file():
        _check_alone(path)
        return [path / SINGLE_FILE]
    files = [path / name for name in sorted(set(_weight_map(path).values()))]
    if not files:
        raise ValueError(f"{path / INDEX_FILE} names no tensor: download it again")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing although {INDEX_FILE} names it: download the shard again")
    return files


def _check_alone(path: Path) -> None:
    """Raises ValueError if an index beside the single file names existing shards."""
    if not (path / INDEX_FILE).is_file():
        return
    shards = sorted(name for name in set(_weight_map(path).values()) - {SINGLE_FILE} if (path / name).exists())
    if shards:
        raise ValueError(
            f"{path} has {SINGLE_FILE} and {INDEX_FILE} with shards such as {shards[0]}, which may be another model: "
            "take away those that are not meant"
        )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor names with their file names."""
    if not (path / INDEX_FILE).is_file():
        raise ValueError(f"{path} has no {SINGLE_FILE} and no {INDEX_FILE}: only safetensors weights can be read")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path / INDEX_FILE} has no weight_map: download it again")
    outside = next((name for name in weight_map.values() if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if outside is not None:
        raise ValueError(f"{path / INDEX_FILE} names {outside}, which is not in the directory: put it there")
    return {name: Path(file).as_posix() for name, file in weight_map.items()}


class WeightFiles:
    """A directory's tensors by name. A context manager; tensors stay valid after it closes."""

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError as `weight_files`, and for a truncated or corrupt file.

        The index decides. `stale`: names with another copy in an unindexed shard. `is_as_transformers_wants`: whether
        transformers reads the same tensors.
        """
        self.path = Path(path)
        self._handles: list[Any] = []
        self._handle_of: dict[str, Any] = {}
        self.stale: list[str] = []
        self.used: set[str] = set()
        files = weight_files(path)
        weight_map = {} if files[0].name == SINGLE_FILE else _weight_map(self.path)
        for file in files:
            try:
                handle, self._is_mapped = _open(file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is truncated or corrupt ({error}): write or download it again") from error
            self._handles.append(handle)
            file_name = file.relative_to(self.path).as_posix()
            for name in handle.keys():  # noqa: SIM118 (no dictionary)
                if weight_map.get(name, file_name) != file_name:
                    self.stale.append(name)
                elif name in self._handle_of:
                    raise ValueError(
                        f"{self.path} has the tensor {name} in two shards, and {INDEX_FILE} does not say which is "
                        "meant: download the shards again"
                    )
                else:
                    self._handle_of[name] = handle
        has_index = files[0].name != SINGLE_FILE
        self.is_as_transformers_wants = not self.stale and (
            not has_index or "metadata" in read_json(self.path / INDEX_FILE)
        )
        for name, file_name in weight_map.items():
            if name not in self._handle_of:
                raise ValueError(
                    f"{self.path / file_name} lacks the tensor {name} although {INDEX_FILE} names it: "
                    "download the shard again"
                )
        if self.stale:
            warnings.warn(
                f"{self.path} has copies of {len(self.stale)} tensors in shards that {INDEX_FILE} does not name for "
                f"them, such as {self.stale[0]}: the copies are not read",
                stacklevel=2,
            )

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.__exit__(kind, error, traceback)

    def __contains__(self, name: str) -> bool:
        return name in self._handle_of

    def names(self) -> list[str]:
        """Names of all tensors, unordered."""
        return list(self._handle_of)

    def unused(self) -> list[str]:
        """Names of tensors that were not read."""
        return sorted(set(self._handle_of) - self.used)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._handle_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype in safetensors' spelling: 'BF16', 'U8', 'F8_E4M3', ..."""
        return str(self._handle_of[name].get_slice(name).get_dtype())

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises ValueError if the tensor is missing or has another shape, ReadError if it cannot be read."""
        self._check(name, shape)
        return self._read(name, lambda handle: handle.get_tensor(name))

    def get_row(self, name: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        """`get(name, shape)[index]`, reading only that row."""
        self._check(name, shape)
        return self._read(name, lambda handle: handle.get_slice(name)[index : index + 1][0])

    def _read(self, name: str, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        try:
            tensor = read(self._handle_of[name])
        except (SafetensorError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ReadError(f"cannot read {name} of {self.path}: {reason}") from error
        return tensor.clone() if self._is_mapped else tensor

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._handle_of:
            raise ValueError(f"{self.path} lacks the tensor {name}: is it a complete model of this {CONFIG_FILE}?")
        self.used.add(name)
        found = self.shape(name)
        if found != tuple(shape):
            raise ValueError(
                f"{self.path}: {name} has shape {found}, {CONFIG_FILE} asks for {tuple(shape)}: "
                "the weights and the configuration are of different models"
            )


def _open(file: Path) -> tuple[Any, bool]:
    """The open file, and whether its tensors are views of a mapping, as always before safetensors 0.8."""
    try:
        return safe_open(file, framework="pt", backend="pread"), False
    except TypeError:
        return safe_open(file, framework="pt"), True

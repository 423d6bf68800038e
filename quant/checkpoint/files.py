"""The files of a Hugging Face directory: config.json, and safetensors in one file or in shards under an index.

Every defect a download, a full disk or a typing error leaves behind becomes a ValueError of one line, before anything
is computed with it.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


def checkpoint_directory(path: str | Path) -> Path:
    """Raises ValueError when `path` is not a directory."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no model directory at {path}: give the path of a directory that holds {CONFIG_FILE}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: is {path.parent} a Hugging Face model directory?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): write or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} instead of an object: download it again")
    return value


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a model directory, sorted by name.

    Raises ValueError when there are none, or when one that the index names is missing.
    """
    path = checkpoint_directory(path)
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if not (path / INDEX_FILE).is_file():
        raise ValueError(f"{path} has no {SINGLE_FILE} and no {INDEX_FILE}: only safetensors weights can be read")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path / INDEX_FILE} has no weight_map: download it again")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing although {INDEX_FILE} names it: download the shard again")
    return files


class WeightFiles:
    """All tensors of a directory by name. A context manager; tensors stay valid after it closes."""

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError as `weight_files` does, and for a truncated or corrupt file."""
        self.path = Path(path)
        self._handles: list[Any] = []
        self._handle_of: dict[str, Any] = {}
        self.used: set[str] = set()
        for file in weight_files(path):
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is truncated or corrupt ({error}): write or download it again") from error
            self._handles.append(handle)
            self._handle_of |= dict.fromkeys(handle.keys(), handle)

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.__exit__(kind, error, traceback)

    def __contains__(self, name: str) -> bool:
        return name in self._handle_of

    def unused(self) -> list[str]:
        """Names of tensors that nobody asked for."""
        return sorted(set(self._handle_of) - self.used)

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises ValueError when the tensor is missing or has another shape."""
        if name not in self._handle_of:
            raise ValueError(f"{self.path} lacks the tensor {name}: is it a complete model of this {CONFIG_FILE}?")
        self.used.add(name)
        tensor = self._handle_of[name].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{self.path}: {name} has shape {tuple(tensor.shape)}, {CONFIG_FILE} asks for {tuple(shape)}: "
                "the weights and the configuration are of different models"
            )
        # A view of the mapped file would change, or end the process, when somebody overwrites that file.
        return tensor.clone()

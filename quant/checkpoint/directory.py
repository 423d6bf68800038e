"""Writes a model directory atomically (`support.files`), one tensor at a time and one shard in memory."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from speedstack.quant.checkpoint.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, ReadError, read_json
from speedstack.support.files import atomic_path

MAX_SHARD_BYTES = 5 * 10**9
# Above 32 MiB, from which the C library always returns freed memory to the system.
_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64


def check_target(path: Path) -> None:
    """Raises ValueError if `path` is neither a model directory nor an empty one, because replacing deletes it.

    A model directory has a config.json that names a model, and no sub-directories. A concurrent replacement is checked
    again.
    """
    while True:
        before = _identity(path)
        try:
            return _check_target(path)
        except (ValueError, OSError):
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, ...] | None:
    """Identifies the file or directory at `path`; None for none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _check_target(path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not (path / CONFIG_FILE).is_file() or "model_type" not in read_json(path / CONFIG_FILE):
        raise ValueError(f"{path} exists and is not a model directory: choose another path")
    inside = sorted(child.name for child in path.iterdir() if child.is_dir())
    if inside:
        raise ValueError(f"{path} holds more than a model, such as the directory {inside[0]}: choose another path")


def check_apart(source: Path, out: Path) -> None:
    """Raises ValueError if replacing `out` would delete `source`."""
    if _resolved(out) in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{out} is or holds {source}, from which the result is made: choose another path")


def check_place(path: Path) -> None:
    """Raises OSError, before long work, if no directory can be made at `path`."""
    place = next(parent for parent in _resolved(path).parents if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {place}")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which replaces the one at `path` if the block succeeds.

    A link at `path` stays; its target is replaced. Raises ValueError as `check_target`, and OSError if `path` cannot be
    written.
    """
    path = _resolved(path)
    check_target(path)
    try:
        with atomic_path(path, replaces_directory=True) as partial:
            partial.mkdir()
            yield partial
            check_target(path)
    except ReadError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


class ShardWriter:
    """Collects tensors into safetensors shards of at most `max_shard_bytes`, one in memory; a larger tensor is its own
    shard.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._arena = _Arena()
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor`: contiguous, on the CPU."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = self._arena.copy(tensor)
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes the rest, names the shards, and writes an index if there are several."""
        self._flush()
        if len(self._shards) == 1:
            (self._directory / "0.shard").rename(self._directory / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(self._shards):
            file_name = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._directory / f"{index}.shard").rename(self._directory / file_name)
            weight_map |= dict.fromkeys(shard, file_name)
        fields = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / INDEX_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._pending, self._directory / f"{len(self._shards)}.shard", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes, self._arena = {}, 0, _Arena()


class _Arena:
    """Memory for one shard's tensors, in chunks.

    On the heap, among freed temporaries, they would keep it from shrinking: three shards' memory instead of one.
    """

    def __init__(self) -> None:
        self._chunk: torch.Tensor | None = None
        self._used_bytes = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the arena; `tensor` itself if larger than a chunk."""
        if tensor.nbytes > _CHUNK_BYTES:
            return tensor
        if self._chunk is None or self._used_bytes + tensor.nbytes > _CHUNK_BYTES:
            self._chunk, self._used_bytes = torch.empty(_CHUNK_BYTES, dtype=torch.uint8), 0
        place = self._chunk[self._used_bytes : self._used_bytes + tensor.nbytes]
        self._used_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        place.copy_(tensor.reshape(-1).view(torch.uint8))
        return place.view(tensor.dtype).view(tensor.shape)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is a link that leads nowhere ({error}): choose another path") from error

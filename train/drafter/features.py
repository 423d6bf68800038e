"""Context features on disk: what a drafter's training reads of a frozen target, computed once.

A directory of safetensors shards, one row a window. `settings.json` has the SHA-256 of the target with its config, the
tapped layers, the windows' SHA-256, and the dtypes of computation and storage; other caches are refused. Shards are
written atomically and shared among ranks; only missing ones are computed. Files are memory-mapped, since a window takes
T x (taps + 1) x hidden values: thousands of times its tokens.

Shape suffixes: N windows, T positions, C columns of features.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speedstack.support.files import atomic_path, write_atomically
from speedstack.train.core.rundir import set_aside
from speedstack.train.core.trainer import save_tensors

WINDOWS_A_SHARD = 64
_TENSOR = "features"


@dataclass(frozen=True)
class FeatureSettings:
    """Whose features a cache holds, and how."""

    target_sha256: str
    target_layer_ids: tuple[int, ...]
    with_final: bool
    windows_sha256: str
    target_dtype: str
    dtype: str


def window_keys(ids_NT: Tensor, documents_NT: Tensor | None = None) -> list[bytes]:
    """One key a window, of its tokens and documents; a window that is one document has the key of its tokens alone."""
    assert ids_NT.dtype == torch.int64, "equal windows have equal bytes in one dtype only"
    keys = [row.tobytes() for row in ids_NT.cpu().numpy()]
    if documents_NT is None:
        return keys
    assert documents_NT.dtype == torch.int64, "as above"
    documents_NT = documents_NT.cpu()
    rows = zip(keys, is_one_document(documents_NT).tolist(), documents_NT.numpy(), strict=True)
    return [key if is_one else key + documents.tobytes() for key, is_one, documents in rows]


def is_one_document(documents_NT: Tensor) -> Tensor:
    """Whether each window is one document without padding (a negative document); bool [N]."""
    return ((documents_NT == documents_NT[:, :1]) & (documents_NT >= 0)).all(1)


def windows_sha256(ids_NT: Tensor, documents_NT: Tensor | None = None) -> str:
    """Digest of the tokens, windows and documents, as in `window_keys`."""
    keys = window_keys(ids_NT, documents_NT)
    return hashlib.sha256(b"".join([str(tuple(ids_NT.shape)).encode(), *keys])).hexdigest()


def write_features(
    path: Path,
    ids_NT: Tensor,
    settings: FeatureSettings,
    compute: Callable[..., Tensor],
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
    documents_NT: Tensor | None = None,
) -> None:
    """Write this rank's missing shards of the features of `ids_NT` into the directory `path`.

    `compute` maps windows [n, T], n <= WINDOWS_A_SHARD, and their documents, if any, to [n, T, C]. `on_progress(done)`
    counts this rank's. Raises ValueError if `path` holds other features, OSError if it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if (path / "settings.json").is_file():
        _check_settings(path, settings)
    elif rank == 0:
        write_atomically(path / "settings.json", json.dumps(_plain(settings), indent=2) + "\n")
    done = 0
    for shard in range(rank, _num_shards(len(ids_NT)), world_size):
        rows = slice(shard * WINDOWS_A_SHARD, (shard + 1) * WINDOWS_A_SHARD)
        parts = [ids_NT[rows]] if documents_NT is None else [ids_NT[rows], documents_NT[rows]]
        file = _shard_path(path, shard)
        if not file.is_file():
            features = compute(*parts).to("cpu", getattr(torch, settings.dtype)).contiguous()
            try:
                with atomic_path(file) as partial:
                    save_tensors({_TENSOR: features}, partial)
            except OSError as error:
                raise OSError(
                    f"cannot write {file}: {error.strerror or error}; make room, then run the same command again to go "
                    "on, or use drafter.features online"
                ) from error
        done += len(parts[0])
        if on_progress is not None:
            on_progress(done)


class StoredFeatures(Mapping[bytes, Tensor]):
    """Features [T, C] by `window_keys`, from `write_features`. Raises ValueError for a bad shard or other settings."""

    def __init__(
        self, path: Path, ids_NT: Tensor, settings: FeatureSettings, documents_NT: Tensor | None = None
    ) -> None:
        _check_settings(path, settings)
        self._rows = {key: row for row, key in enumerate(window_keys(ids_NT, documents_NT))}
        self._slices = []
        for shard in range(_num_shards(len(ids_NT))):
            file = _shard_path(path, shard)
            num_rows = min(WINDOWS_A_SHARD, len(ids_NT) - shard * WINDOWS_A_SHARD)
            try:
                rows = safe_open(file, framework="pt").get_slice(_TENSOR)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} is missing or corrupt ({error}): delete it and run again") from error
            if rows.get_shape()[0] != num_rows:
                raise ValueError(f"{file} has {rows.get_shape()[0]} rows instead of {num_rows}: delete it")
            self._slices.append(rows)

    def __getitem__(self, key: bytes) -> Tensor:
        shard, place = divmod(self._rows[key], WINDOWS_A_SHARD)
        return self._slices[shard][place]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _num_shards(num_windows: int) -> int:
    return math.ceil(num_windows / WINDOWS_A_SHARD)


def _shard_path(path: Path, shard: int) -> Path:
    return path / f"features-{shard:05d}.safetensors"


def _plain(settings: FeatureSettings) -> dict[str, object]:
    return json.loads(json.dumps(asdict(settings)))  # tuples become lists, as in the file


def holds_final(path: Path) -> bool:
    """Whether the cache at `path` has final states; it then also serves callers that need none."""
    file = path / "settings.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("with_final"))


def make_way(path: Path, settings: FeatureSettings) -> None:
    """Set aside features at `path` that have other settings."""
    file = path / "settings.json"
    if file.is_file() and _different(file, settings):
        set_aside(path, "features")


def _different(file: Path, settings: FeatureSettings) -> list[str]:
    stored = json.loads(file.read_text(encoding="utf-8"))
    return [name for name, value in _plain(settings).items() if stored.get(name) != value]


def _check_settings(path: Path, settings: FeatureSettings) -> None:
    file = path / "settings.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no features: {file.name} is missing")
    if different := _different(file, settings):
        raise ValueError(
            f"{path} holds features with another {', '.join(different)}: choose another drafter.features_path or "
            "delete it"
        )

"""Drafter directories: config.json and model.safetensors, as z-lab publishes them.

Loading checks everything before a tensor is used: the files, the config, every tensor's name and shape. `check_target`
then compares the drafter with the target it is about to serve, because a drafter of another target is invisible in the
output: verification hides it, and only speed is lost.

Left out: sharded drafters (a drafter is one file) and the SHA-256 itself, which the caller computes of the target.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.formats import zlab
from speedstack.dflash.model import DFlashDraftModel, check_draft_ids

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_drafter(model: DFlashDraftModel, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` as a z-lab directory at `path`, tensors in `dtype` (None: as they are).

    Written next to `path` and renamed, so that `path` is never half a drafter; an existing drafter is replaced.
    Raises ValueError when `path` is something else.
    """
    path = Path(path)
    tensors = {name: _cast(t.detach().cpu(), dtype).contiguous() for name, t in model.state_dict().items()}
    stored_dtype = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    if path.exists() and not (path / CONFIG_NAME).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds no drafter: it is not overwritten, choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        staged = Path(scratch) / "drafter"
        staged.mkdir()
        (staged / CONFIG_NAME).write_text(json.dumps(zlab.to_json(model.config, stored_dtype), indent=2) + "\n")
        save_file(tensors, staged / WEIGHTS_NAME, metadata={"format": "pt"})
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(staged, path)


def load_config(path: str | Path) -> DFlashConfig:
    """Read `path`/config.json. Raises ValueError, one line, when it is missing, not JSON, or not a drafter's."""
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"no drafter at {path}: {CONFIG_NAME} is missing")
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a JSON object")
    return zlab.from_json(raw)


def load_drafter(path: str | Path, dtype: torch.dtype | None = None) -> DFlashDraftModel:
    """Read a z-lab drafter directory, in `dtype` (None: as stored), in eval mode on the CPU.

    Raises ValueError, one line, for a missing or corrupt file and for tensors that are missing, unknown or misshapen.
    """
    config = load_config(path)
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"no drafter at {path}: {WEIGHTS_NAME} is missing")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}") from error
    with torch.device("meta"):
        model = DFlashDraftModel(config)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{file} lacks tensor {name}")
        if name not in wanted:
            raise ValueError(f"{file} has tensor {name}, which a DFlash drafter of its config does not")
        if wanted[name] != found[name]:
            raise ValueError(f"{file}: {name} has shape {list(found[name])}, its config says {list(wanted[name])}")
    # Copies: the loaded tensors are a memory map, and a file overwritten in place later would change or crash them.
    model.load_state_dict({name: _cast(t, dtype).clone() for name, t in tensors.items()}, assign=True)
    if model.d2t is not None:
        check_draft_ids(model.target_ids(torch.arange(len(model.d2t))), config.vocab_size)
    return model.eval()


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`tensor` in `dtype`; integers, which are ids, stay what they are."""
    return tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor


def check_target(
    config: DFlashConfig, target_sha256: str | None, hidden_size: int, num_layers: int, vocab_size: int
) -> None:
    """Refuse a drafter that was made for another target: ValueError, one line, before any of its weights is used.

    Shapes are always compared. The SHA-256 of the target's weights is compared when both sides have one; drafters
    from elsewhere name none.
    """
    for name, ours, theirs in (
        ("hidden size", config.hidden_size, hidden_size),
        ("number of layers", config.num_target_layers, num_layers),
        ("vocabulary", config.vocab_size, vocab_size),
    ):
        if ours != theirs:
            raise ValueError(f"drafter of another target: it expects {name} {ours}, this target has {theirs}")
    if config.target_sha256 and target_sha256 and config.target_sha256 != target_sha256:
        raise ValueError(
            f"drafter of another target: it was trained for weights with SHA-256 {config.target_sha256[:12]}..., "
            f"this target's are {target_sha256[:12]}...; train a drafter for this target"
        )

"""Drafter directories: config.json, model.safetensors, an optional mask embedding, and a model card.

All formats of `dflash.formats` are read. Ours is written by default: without options it is z-lab's to the byte. Loading
checks files, config, tensor names and shapes first. `check_target` compares drafter and target, because a wrong drafter
is invisible in the output: verification hides it and only speed is lost.

Left out: computing the target's SHA-256, which the caller does.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speedstack.dflash import card as model_card
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.formats.format import DrafterFormat, Target, Tensors
from speedstack.dflash.formats.registry import FORMATS, recognize
from speedstack.dflash.model import DFlashDraftModel, check_draft_ids
from speedstack.support.files import atomic_path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MASK_EMBEDDING_NAME = "mask_embedding.pt"


def save_drafter(
    model: DFlashDraftModel,
    path: str | Path,
    dtype: torch.dtype | None = None,
    card: Mapping[str, Any] | None = None,
    to: str = "speedstack",
    target: Target | None = None,
) -> None:
    """Writes `model` to the directory `path`, tensors in `dtype` (None: as they are), with a README.md.

    `card`: facts for the README (`dflash.card.FACTS`). `to`: a name in `FORMATS`; `target`: target data that some
    formats need. Replaces an existing drafter atomically. Raises ValueError if `path` is something else, if the format
    does not support an option, or for an unknown fact.
    """
    path, target = Path(path), target or Target()
    form = named_format(to)
    form.refuse_options(model.config)
    tensors = {name: _cast(t.detach().cpu(), dtype) for name, t in model.state_dict().items()}
    stored_dtype = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    mask_embedding = tensors.pop("mask_embedding", None)
    raw = form.to_json(model.config, stored_dtype, target)
    stored = {name: t.contiguous() for name, t in form.to_tensors(tensors, model.config, target).items()}
    facts = model_card.complete(card or {}, model.config, target.name)
    if path.exists() and not (path / CONFIG_NAME).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds no drafter: it is not overwritten, choose another path")
    with atomic_path(path, replaces_directory=True) as staged:
        staged.mkdir()
        (staged / CONFIG_NAME).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        save_file(stored, staged / WEIGHTS_NAME, metadata={"format": "pt"})
        if mask_embedding is not None:
            saved = {"embedding": mask_embedding.contiguous(), "mask_token_id": model.config.mask_token_id}
            torch.save(saved, staged / MASK_EMBEDDING_NAME)
        (staged / model_card.FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (staged / "README.md").write_text(model_card.render(facts, model.config, form.name), encoding="utf-8")


def convert_drafter(
    source: str | Path, to: str, out: str | Path, target: Target | None = None, target_sha256: str | None = None
) -> DFlashConfig:
    """Writes the drafter at `source` in the format `to`, with its card; returns its config.

    `target_sha256`: weights of the new target; None keeps the old one. Raises ValueError as `load_drafter` and
    `save_drafter`, and if `out` is `source`.
    """
    if Path(out).resolve() == Path(source).resolve():
        raise ValueError(f"{out} is the drafter to convert; choose another --out")
    model = load_drafter(source)
    if target_sha256 is not None:
        model.config = replace(model.config, target_sha256=target_sha256)
    save_drafter(model, out, card=model_card.read(source), to=to, target=target)
    return model.config


def named_format(name: str) -> DrafterFormat:
    """The format called `name`. Raises ValueError, listing all formats."""
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no format of drafters: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def is_drafter(path: str | Path) -> bool:
    """Whether `path` is a drafter's directory in any format, supported or not."""
    try:
        drafter_format(path)
    except ValueError:
        return False
    return True


def drafter_format(path: str | Path) -> DrafterFormat:
    """The format of the drafter at `path`. Raises ValueError as `load_config`."""
    form = recognize(_read_json(path, CONFIG_NAME))
    if form is None:
        raise ValueError(
            f"{Path(path) / CONFIG_NAME} is no drafter's: it is in none of the formats {', '.join(FORMATS)}"
        )
    return form


def load_config(path: str | Path) -> DFlashConfig:
    """Reads `path`/config.json. Raises ValueError, one line, if it is missing, invalid JSON, or no drafter's."""
    form = drafter_format(path)
    config = form.from_json(_read_json(path, CONFIG_NAME))
    if (Path(path) / MASK_EMBEDDING_NAME).is_file() and not config.mask_embedding:
        config = replace(config, mask_embedding=True)
        form.refuse_options(config)
    return config


def load_drafter(path: str | Path, dtype: torch.dtype | None = None) -> DFlashDraftModel:
    """Reads a drafter of any format in `dtype` (None: as stored), in eval mode on the CPU.

    Raises ValueError, one line, for missing or corrupt files and for missing, unknown or misshapen tensors.
    """
    config = load_config(path)
    tensors = drafter_format(path).from_tensors(_read_tensors(Path(path)), config)
    if config.mask_embedding:
        tensors |= {"mask_embedding": _read_mask_embedding(Path(path) / MASK_EMBEDDING_NAME, config)}
    with torch.device("meta"):
        model = DFlashDraftModel(config)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{path} lacks tensor {name}")
        if name not in wanted:
            raise ValueError(f"{path} has tensor {name}, which a DFlash drafter of its config does not")
        if wanted[name] != found[name]:
            raise ValueError(f"{path}: {name} has shape {list(found[name])}, its config says {list(wanted[name])}")
    if "d2t" in tensors:
        _check_d2t(tensors["d2t"], config)
    # Copied: loaded tensors map the file, and overwriting it later would change them or crash.
    model.load_state_dict({name: _cast(t, dtype).clone() for name, t in tensors.items()}, assign=True)
    return model.eval()


def _read_json(path: str | Path, name: str) -> dict[str, Any]:
    file = Path(path) / name
    if not file.is_file():
        raise ValueError(f"no drafter at {path}: {name} is missing")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a JSON object")
    return raw


def _read_tensors(path: Path) -> Tensors:
    """All tensors of model.safetensors, or of an index's files."""
    names = [WEIGHTS_NAME]
    if not (path / WEIGHTS_NAME).is_file() and (path / INDEX_NAME).is_file():
        places = _read_json(path, INDEX_NAME).get("weight_map")
        if not isinstance(places, dict) or not all(Path(str(name)).name == name for name in places.values()):
            raise ValueError(f"{path / INDEX_NAME} has no weight_map to files beside it")
        names = sorted(set(places.values()))
    tensors: Tensors = {}
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"no drafter at {path}: {name} is missing")
        try:
            tensors |= load_file(path / name)
        except SafetensorError as error:
            raise ValueError(f"{path / name} is truncated or corrupt: {error}") from error
    return tensors


def _read_mask_embedding(file: Path, config: DFlashConfig) -> torch.Tensor:
    """MiMo's file: {"embedding": [D], "mask_token_id": id} or the tensor alone; unpickled without running code."""
    if not file.is_file():
        raise ValueError(
            f"no drafter at {file.parent}: its config.json says it has a mask embedding, {file.name} is missing"
        )
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is corrupt, or holds more than tensors and numbers: {reason}") from error
    if isinstance(saved, dict):
        if saved.get("per_position"):
            raise ValueError(f"{file}: mask embeddings by position are not supported")
        if saved.get("mask_token_id", config.mask_token_id) != config.mask_token_id:
            raise ValueError(
                f"{file} is the embedding of token {saved['mask_token_id']}, config.json says {config.mask_token_id}"
            )
        saved = saved.get("embedding")
    if not isinstance(saved, torch.Tensor) or not saved.is_floating_point():
        raise ValueError(f"{file} holds no embedding")
    if saved.numel() != config.hidden_size or saved.shape[-1] != config.hidden_size:
        raise ValueError(f"{file}: embedding has shape {list(saved.shape)}, its config says [{config.hidden_size}]")
    return saved.flatten()


def _check_d2t(d2t_U: torch.Tensor, config: DFlashConfig) -> None:
    if d2t_U.is_floating_point():
        raise ValueError(f"drafter's d2t must be integers, got {d2t_U.dtype}")
    check_draft_ids(d2t_U.long() + torch.arange(len(d2t_U)), config.vocab_size)


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`tensor` in `dtype`; integers (ids) become int64."""
    return tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor.long()


def check_target(
    config: DFlashConfig, target_sha256: str | None, hidden_size: int, num_layers: int, vocab_size: int
) -> None:
    """Raises ValueError, one line, for a drafter made for another target.

    Compares shapes, that tapped layers exist, and the SHA-256 of the target's weights if both sides have one.
    """
    for name, ours, theirs in (
        ("hidden size", config.hidden_size, hidden_size),
        ("number of layers", config.num_target_layers, num_layers),
        ("vocabulary", config.vocab_size, vocab_size),
    ):
        if ours is not None and ours != theirs:
            raise ValueError(f"drafter of another target: it expects {name} {ours}, this target has {theirs}")
    if max(config.target_layer_ids) >= num_layers:
        raise ValueError(
            f"drafter of another target: it reads the output of layer {max(config.target_layer_ids)}, this target has "
            f"layers 0..{num_layers - 1}"
        )
    if config.target_sha256 and target_sha256 and config.target_sha256 != target_sha256:
        raise ValueError(
            f"drafter of another target: it was trained for weights with SHA-256 {config.target_sha256[:12]}..., "
            f"this target's are {target_sha256[:12]}...; train one for this target, or where it is the same model in "
            "another format, take the drafter over: speedstack convert DRAFTER --to speedstack --target TARGET"
        )

"""SHA-256 of a model directory: of its weights, which identify a drafter's target, or of all it computes with."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from speedstack.quant.checkpoint.files import CONFIG_FILE, INDEX_FILE, read_json, weight_files
from speedstack.quant.checkpoint.formats import EXPERTS_FILE
from speedstack.support.digests import add_file, file_sha256


def weights_sha256(path: str | Path, beside: Sequence[str] = ()) -> str:
    """Hex digest of the safetensors files in name order, GGUF experts, then files `beside` that exist.

    Raises ValueError for a directory without weights or with a missing shard.
    """
    digest = hashlib.sha256()
    files = weight_files(path)
    others = [Path(path) / name for name in (EXPERTS_FILE, *beside)]
    files += [file for file in others if file.is_file()]
    for file in files:
        add_file(digest, file)
    return digest.hexdigest()


def config_sha256(path: str | Path) -> str:
    """Hex digest of config.json. Raises OSError if it cannot be read."""
    return file_sha256(Path(path) / CONFIG_FILE)


def model_sha256(path: str | Path) -> str:
    """Hex digest of all that decides a model's results: weights, config, generation config, and the shard index.

    It identifies the model behind texts, features and scores: another rope scaling is another model. Raises ValueError
    as `weights_sha256`.
    """
    digest = hashlib.sha256(weights_sha256(path).encode())
    for name in (CONFIG_FILE, "generation_config.json"):
        file = Path(path) / name
        digest.update(f"\0{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    index = Path(path) / INDEX_FILE  # decides which shard's copy of a tensor counts
    if index.is_file():
        digest.update(json.dumps(read_json(index).get("weight_map"), sort_keys=True).encode())
    return digest.hexdigest()

"""SHA-256 of a model directory: of its weights, by which a drafter names its target, or of all it computes with."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from speedstack.quant.checkpoint.files import CONFIG_FILE, INDEX_FILE, read_json, weight_files
from speedstack.quant.checkpoint.formats import EXPERTS_FILE
from speedstack.support.digests import add_file, file_sha256


def weights_sha256(path: str | Path, beside: Sequence[str] = ()) -> str:
    """Hex digest over the bytes of the directory's safetensors files, in the order of their names, and of GGUF experts.

    `beside`: names of other files that hold weights where they are there; they count after those.

    Raises ValueError for a directory without weights, or with a shard missing.
    """
    digest = hashlib.sha256()
    files = weight_files(path)
    others = [Path(path) / name for name in (EXPERTS_FILE, *beside)]
    files += [file for file in others if file.is_file()]
    for file in files:
        add_file(digest, file)
    return digest.hexdigest()


def config_sha256(path: str | Path) -> str:
    """Hex digest of a directory's config.json, which decides with the weights what a model computes.

    Raises OSError when it cannot be read.
    """
    return file_sha256(Path(path) / CONFIG_FILE)


def model_sha256(path: str | Path) -> str:
    """Hex digest of what decides what a model computes, and where its texts end: weights, config, generation config,
    and which shard's copy of a tensor counts.

    What was made with a model (text, features, scores) is of that model alone: the same weights under another config,
    with another rope scaling for one, are another. Raises ValueError as `weights_sha256`.
    """
    digest = hashlib.sha256(weights_sha256(path).encode())
    for name in (CONFIG_FILE, "generation_config.json"):
        file = Path(path) / name
        digest.update(f"\0{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    index = Path(path) / INDEX_FILE  # of two shards with a tensor it says whose counts
    if index.is_file():
        digest.update(json.dumps(read_json(index).get("weight_map"), sort_keys=True).encode())
    return digest.hexdigest()

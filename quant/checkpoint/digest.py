"""SHA-256 of a model directory's weights: how a drafter says for which target it was trained."""

import hashlib
from pathlib import Path

from speedstack.quant.checkpoint.files import weight_files


def weights_sha256(path: str | Path) -> str:
    """Hex digest over the bytes of the directory's safetensors files, in the order of their names.

    Raises ValueError for a directory without weights, or with a shard missing.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()

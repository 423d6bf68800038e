"""SHA-256 of a model directory's weights: how a drafter says for which target it was trained."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from speedstack.quant.checkpoint.files import weight_files
from speedstack.quant.checkpoint.formats import EXPERTS_FILE


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
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()

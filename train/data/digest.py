"""Digests of what a run reads besides weights: a prepared corpus, any other files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def corpus_digest(path: Path) -> str:
    """SHA-256 of a prepared corpus: its settings, its tokenizer, its tokens. Raises ValueError where there is none."""
    if not (path / "corpus.json").is_file():
        raise ValueError(f"{path} is not a prepared corpus")
    # Not what `datasets` notes beside the tokens, which differs between two preparations of one text.
    tokens = sorted(file for part in ("train", "heldout") for file in (path / part).glob("data-*.arrow"))
    return files_digest(path, [path / "corpus.json", path / "tokenizer" / "tokenizer.json", *tokens])


def files_digest(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 of the names below `root`, the sizes and the contents of `files`. Raises OSError as the file system."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()

"""The digest of a prepared corpus."""

from pathlib import Path

from speedstack.support.digests import files_sha256


def corpus_digest(path: Path) -> str:
    """SHA-256 of a prepared corpus' settings, tokenizer and tokens. Raises ValueError if there is none."""
    if not (path / "corpus.json").is_file():
        raise ValueError(f"{path} is not a prepared corpus")
    # Without the notes of `datasets` beside the tokens, which differ between two preparations of one text.
    tokens = sorted(file for part in ("train", "heldout") for file in (path / part).glob("data-*.arrow"))
    return files_sha256(path, [path / "corpus.json", path / "tokenizer" / "tokenizer.json", *tokens])

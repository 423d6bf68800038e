"""The tokens that end a model's texts, as in other engines.

transformers' `generate` reads generation_config.json, or else config.json; vLLM, SGLang and lm-eval's Hugging Face
adapter add the tokenizer's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME

from speedstack.quant.checkpoint.files import CONFIG_FILE, read_json

EOS_KEY = "eos_token_id"


def end_token_ids(path: str | Path, vocab_size: int, tokenizer: Any = None) -> tuple[int, ...]:
    """The end tokens of the model at `path`, ascending; `tokenizer`: its own, if any.

    Raises ValueError, one line with file and key, for ids that are no integers or not in the vocabulary.
    """
    path = Path(path)
    found = _end_tokens_of(path / GENERATION_CONFIG_NAME, vocab_size) if _has_generation_config(path) else ()
    found = found or _end_tokens_of(path / CONFIG_FILE, vocab_size)
    own = None if tokenizer is None else tokenizer.eos_token_id
    if own is not None and not 0 <= own < vocab_size:
        raise ValueError(
            f"the tokenizer of {path} ends texts with {tokenizer.eos_token!r}, whose id {own} is outside the model's "
            f"vocabulary of {vocab_size} tokens: they do not belong together"
        )
    return tuple(sorted({*found, *(() if own is None else (own,))}))


def _has_generation_config(path: Path) -> bool:
    return (path / GENERATION_CONFIG_NAME).is_file()


def _end_tokens_of(file: Path, vocab_size: int) -> Sequence[int]:
    """End tokens of one file, possibly in the text part of a multi-part model."""
    fields = read_json(file)
    value, key = fields.get(EOS_KEY), EOS_KEY
    text_part = fields.get("text_config")
    if value is None and isinstance(text_part, dict):
        value, key = text_part.get(EOS_KEY), f"text_config.{EOS_KEY}"
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(map(_is_integer, ids)):
        raise _malformed(file, key, value, "a token id or a list of them")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"{file}: {key} names the token {outside}, outside the vocabulary of {vocab_size} tokens: correct or "
            "remove it"
        )
    return ids


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _malformed(file: Path, key: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{file}: {key} is {value!r} and should be {expected}: correct or remove it")

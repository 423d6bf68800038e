"""A model directory's tokenizer, only as its files define it.

transformers guesses: without tokenizer files it invents a one-token tokenizer, it may ask to run a checkpoint's code,
and it passes tokenizer.json through a class that may split differently or add tokens. Here that is an error or a
warning.
"""

from __future__ import annotations

import json
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
# Files that transformers reads tokenizers from. A chat template alone is none.
_VOCABULARIES = (
    TOKENIZER_FILE, "tokenizer.model*", "*tekken*.json", "*.tiktoken", "tiktoken.model", "vocab.json", "merges.txt",
    "vocab.txt", "*.bpe.model", "spiece.model", "*.spm",
)  # fmt: skip
_SETTINGS = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")

_ORDINARY_TEXT = "The quick brown fox jumps over a lazy dog.\nIt has 12 lines, and 3 of them say: return x + 1\n"


def tokenizer_files(path: str | Path) -> list[Path]:
    """The tokenizer's files in `path`, by name; empty without one."""
    patterns = (*_VOCABULARIES, *_SETTINGS)
    return sorted(file for file in Path(path).iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns))


def find_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `path`; None without tokenizer files. Never runs the directory's code.

    Warns about a tokenizer that cannot encode ordinary text, and about transformers' changes to tokenizer.json. Raises
    ValueError, one line, for no directory, unreadable or missing files, and a tokenizer that needs its own code.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no directory {path} to read a tokenizer from")
    files = tokenizer_files(path)
    if not files:
        return None
    own = _read_own(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        ids = tokenizer.encode(_ORDINARY_TEXT, add_special_tokens=False)
        own_ids = own.encode(_ORDINARY_TEXT, add_special_tokens=False).ids if own is not None else ids
    # tokenizers raises bare Exception, and transformers trusts the types and keys in these files.
    except Exception as error:
        raise ValueError(f"{path} has no tokenizer that can be read: {_reason(path, files, error)}") from error
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{path} has no tokenizer that can be read: {', '.join(file.name for file in files)} give no token but "
            f"special ones; put {TOKENIZER_FILE}, or the files it was made from, beside them"
        )
    for fault in (_loss(tokenizer, ids), _additions(path, tokenizer, own), _difference(tokenizer, ids == own_ids)):
        if fault is not None:
            warnings.warn(f"the tokenizer of {path} {fault}", stacklevel=2)
    return tokenizer


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Like `find_tokenizer`, for a model whose embedding has `vocab_size` rows, if known.

    Raises ValueError also for missing files and for ids beyond the embedding.
    """
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer: put {TOKENIZER_FILE} and {SETTINGS_FILE} of the model's tokenizer there"
        )
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {path} has ids up to {largest}, the model an embedding of {vocab_size}: they do not "
            "belong together"
        )
    return tokenizer


def _read_own(path: Path) -> Tokenizer | None:
    """tokenizer.json alone."""
    file = path / TOKENIZER_FILE
    if not file.exists():
        return None
    try:
        own = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # bare, from tokenizers
        raise ValueError(
            f"{path} has no tokenizer that can be read: {TOKENIZER_FILE} is broken ({_one_line(error)})"
        ) from error
    own.no_truncation()
    own.no_padding()
    return own


def _reason(path: Path, files: list[Path], error: Exception) -> str:
    names = [file.name for file in files]
    if code := _own_code(path):
        return (
            f"it needs code of its own ({code}), which is not run; save the tokenizer as {TOKENIZER_FILE} and leave "
            f"auto_map out of {SETTINGS_FILE}"
        )
    if not set(names) - set(_SETTINGS):
        return f"it has {' and '.join(names)}, but no vocabulary; put {TOKENIZER_FILE} beside them"
    if ("vocab.json" in names) != ("merges.txt" in names) and TOKENIZER_FILE not in names:
        return f"of vocab.json and merges.txt one is missing ({_one_line(error)})"
    if TOKENIZER_FILE not in names and any(name.endswith(".model") for name in names):
        return f"{_one_line(error)}; a .model file needs the package sentencepiece or tiktoken, {TOKENIZER_FILE} none"
    return f"{_one_line(error)}; it is made of {', '.join(names)}"


def _own_code(path: Path) -> str | None:
    """The class in `auto_map`, if any."""
    try:
        auto_map: Any = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError):  # what is wrong with the file is what transformers said of it
        return None
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    return next((str(name) for name in named if name), None) if isinstance(named, list) else named


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def _loss(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str | None:
    """What is wrong with the ids of ordinary text, None if nothing."""
    num_unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if 2 * num_unknown > len(ids):
        return f"does not know {num_unknown} of the {len(ids)} tokens of ordinary text: is it the model's?"
    if len(set(ids)) < 2:
        return f"makes {'one token' if ids else 'no token'} of all ordinary text: is it the model's?"
    return None


def _additions(path: Path, tokenizer: PreTrainedTokenizerBase, own: Tokenizer | None) -> str | None:
    """Tokens that transformers' class adds by default and the model has never seen."""
    if own is None:
        return None
    known = own.get_vocab(with_added_tokens=True)
    texts = [(path / name).read_text(encoding="utf-8") for name in _SETTINGS if (path / name).exists()]
    for token in tokenizer.get_vocab().keys() - known.keys():
        spellings = (json.dumps(token), json.dumps(token, ensure_ascii=False))
        if not any(spelling in text for text in texts for spelling in spellings):
            return (
                f"has tokens that no file names, such as {token}: say in {SETTINGS_FILE} which special ones there are"
            )
    return None


def _difference(tokenizer: PreTrainedTokenizerBase, is_same: bool) -> str | None:
    if is_same:
        return None
    return (
        f"reads text as transformers' {type(tokenizer).__name__} does, and {TOKENIZER_FILE} says otherwise: if that "
        f"file is right, set tokenizer_class to PreTrainedTokenizerFast in {SETTINGS_FILE}"
    )

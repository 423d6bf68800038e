"""Checks and converts prompts, sampling parameters, seeds and stop strings.

Anything ambiguous is a one-line ValueError: floats and booleans are no ids, and array rows that look padded are
refused. A tokenizer's output loses its padding.
"""

import operator
from collections.abc import Mapping, Sequence
from numbers import Number, Real
from typing import Any

import numpy as np
import torch

from speedstack.runtime.rounds.sampling import SamplingParams

Prompt = str | list[int]
ACCEPTED = (
    "a prompt is text, or integer token ids as a list, tuple, range, array or tensor, or what a tokenizer returned; "
    "several are a list of these or a 2-D array"
)


def split_prompts(prompts: Any, tokenizer: Any = None) -> tuple[list[Prompt], bool]:
    """The prompts, each text or ids, and whether there was a single one. Raises ValueError for any other type.

    The tokenizer names the padding token.
    """
    if isinstance(prompts, str):
        return [str(prompts)], True
    if isinstance(prompts, Mapping):
        return _encoded(prompts, tokenizer)
    if _is_array(prompts):
        return _array(prompts, tokenizer)
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise ValueError(f"{ACCEPTED}; not {type(prompts).__name__}")
    if len(prompts) and _is_scalar(prompts[0]):
        return [_ids(prompts)], True
    return [_one_of_several(prompt, index, tokenizer) for index, prompt in enumerate(prompts)], False


def single_prompt(prompt: Any, tokenizer: Any = None) -> Prompt:
    """The one prompt, or that of a batch of one. Raises ValueError as `split_prompts`."""
    found, _ = split_prompts(prompt, tokenizer)
    if not found:  # an empty list is an empty prompt here
        return []
    if len(found) != 1:
        raise ValueError(f"this takes one prompt, and here are {len(found)}: call it once for each")
    return found[0]


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds, as in transformers, vLLM and lm-eval.

    A text that already begins with BOS, as chat templates write it, gets no special tokens.
    """
    bos = tokenizer.bos_token
    begins_with_it = bool(bos) and text.startswith(bos)
    return list(tokenizer.encode(text, add_special_tokens=not begins_with_it, verbose=False))


def encode_prompt(prompt: Any, tokenizer: Any, vocab_size: int, max_length: int) -> list[int]:
    """Token ids of one prompt. Raises ValueError unless there are 1 to `max_length`, all in the vocabulary."""
    found = single_prompt(prompt, tokenizer)
    if isinstance(found, str):
        if tokenizer is None:
            raise ValueError("the target has no tokenizer files; give token ids instead of text")
        found = encode_text(found, tokenizer)
    if not found:
        raise ValueError("the prompt is empty; give at least one token")
    bad = next((token for token in found if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise ValueError(f"token id {bad} is outside the vocabulary of {vocab_size} tokens")
    if len(found) > max_length:
        raise ValueError(f"{len(found)} tokens do not fit the buffers of {max_length} positions; raise max_length")
    return found


def sampling_params(temperature: Any, top_p: Any, top_k: Any) -> SamplingParams:
    """Accepts Python, NumPy and tensor numbers. Raises ValueError for other types and values out of range."""
    return SamplingParams(real("temperature", temperature), real("top_p", top_p), integer("top_k", top_k))


def seeds_for(seed: Any, num_prompts: int) -> list[int]:
    """One seed per prompt. Raises ValueError for anything but integers."""
    if _is_scalar(seed):
        return [integer("seed", seed)] * num_prompts
    if not (_is_array(seed) and seed.ndim == 1) and not (isinstance(seed, Sequence) and not isinstance(seed, str)):
        raise ValueError(f"seed must be an integer, or one integer a prompt, not {_brief(seed)}")
    seeds = [integer("seed", one) for one in seed]
    if len(seeds) != num_prompts:
        raise ValueError(f"{len(seeds)} seeds for {num_prompts} prompts: give one seed, or one a prompt")
    return seeds


def stop_strings(stop: Any) -> tuple[str, ...]:
    """None means none. Raises ValueError for an empty string or anything that is no string."""
    found = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, Sequence | set | frozenset) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"stop must be a string or a list of strings, not {_brief(stop)}")
    if "" in found:
        raise ValueError("stop strings must not be empty: an empty one is everywhere")
    return tuple(map(str, found))


def integer(name: str, value: Any) -> int:
    """A Python, NumPy or tensor integer. Raises ValueError for anything else, booleans included."""
    number = _as_integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, not {_brief(value)}")
    return number


def real(name: str, value: Any) -> float:
    """A Python, NumPy or tensor number. Raises ValueError for anything else, booleans included."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, not {_brief(value)}")
    return float(value)


def _as_integer(value: Any) -> int | None:
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and (value.ndim or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Number | np.generic) or (_is_array(value) and value.ndim == 0)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _ids(tokens: Sequence[Any]) -> list[int]:
    if all(type(token) is int for token in tokens):
        return list(tokens)
    ids = [_as_integer(token) for token in tokens]
    if None in ids:
        place = ids.index(None)
        raise ValueError(f"token {place} of a prompt is {_brief(tokens[place])}, which is no integer; {ACCEPTED}")
    return ids  # type: ignore[return-value]


def _one_of_several(prompt: Any, index: int, tokenizer: Any) -> Prompt:
    try:
        found, is_single = split_prompts(prompt, tokenizer)
    except ValueError as error:
        raise ValueError(f"prompt {index}: {error}") from error
    # An empty list is an empty prompt here.
    if not is_single and found:
        raise ValueError(f"prompt {index} is itself a list of prompts; {ACCEPTED}")
    return found[0] if found else []


def _array(array: torch.Tensor | np.ndarray, tokenizer: Any, is_masked: bool = False) -> tuple[list[Prompt], bool]:
    """Ids [T] or [N, T], or an array of texts or lists."""
    if isinstance(array, np.ndarray) and array.dtype.kind in "UOT" and array.ndim == 1:
        return split_prompts(array.tolist(), tokenizer)
    is_integer = (
        array.dtype.kind in "iu"
        if isinstance(array, np.ndarray)
        else not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
    )
    if not is_integer or array.ndim not in (1, 2):
        raise ValueError(f"{ACCEPTED}; not an array of {array.dtype} with {array.ndim} dimensions")
    ids = array.tolist()
    if array.ndim == 1:
        return [ids], True
    if not is_masked:
        _refuse_padding(ids, tokenizer)
    return ids, False


def _encoded(encoding: Mapping[str, Any], tokenizer: Any) -> tuple[list[Prompt], bool]:
    """A tokenizer's output: `input_ids` of one or several texts, without what `attention_mask` masks."""
    if "input_ids" not in encoding:
        raise ValueError(
            f"a mapping is a prompt if it has input_ids, as a tokenizer returns it; this one has "
            f"{', '.join(map(str, encoding)) or 'nothing'}. Messages of a chat go through the tokenizer's "
            "apply_chat_template first"
        )
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    if isinstance(ids, str | Mapping):
        raise ValueError(f"input_ids must be token ids, not {type(ids).__name__}")
    rows, is_single = _array(ids, tokenizer, is_masked=True) if _is_array(ids) else split_prompts(ids, tokenizer)
    if not rows:  # an empty text
        return [[]], True
    if any(isinstance(row, str) for row in rows):
        raise ValueError("input_ids must be token ids, not text")
    if mask is None:
        if not is_single:
            _refuse_padding(rows, tokenizer)  # type: ignore[arg-type]
        return rows, is_single
    masks = [_plain(mask)] if is_single else _plain(mask)
    if not isinstance(masks, list) or len(masks) != len(rows) or not all(map(_is_mask_of, masks, rows)):
        raise ValueError("input_ids and attention_mask have different shapes: give both as the tokenizer returned them")
    return [_unpadded(row, kept) for row, kept in zip(rows, masks, strict=True)], is_single  # type: ignore[arg-type]


def _plain(mask: Any) -> Any:
    """Nested arrays and sequences as lists."""
    if _is_array(mask):
        return mask.tolist()
    return [_plain(one) for one in mask] if isinstance(mask, Sequence) and not isinstance(mask, str) else mask


def _is_mask_of(mask: Any, row: Prompt) -> bool:
    return isinstance(mask, list) and len(mask) == len(row) and all(isinstance(one, Number) for one in mask)


def _unpadded(ids: list[int], mask: list[Any]) -> list[int]:
    places = [place for place, is_kept in enumerate(mask) if is_kept]
    if places and places[-1] - places[0] + 1 != len(places):
        raise ValueError("attention_mask leaves out tokens in the middle of a prompt: only padding can be taken off")
    return [ids[place] for place in places]


def _refuse_padding(rows: Sequence[list[int]], tokenizer: Any) -> None:
    """Raises ValueError for rows that begin or end with the padding token, unless it is their common BOS or EOS."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if pad is None:
        return
    is_other = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for where, step in (("begins", 1), ("ends", -1)):
        runs = [next((n for n, token in enumerate(row[::step]) if token != pad), len(row)) for row in rows]
        if any(runs) and not (is_other and set(runs) == {1}):
            row = next(index for index, run in enumerate(runs) if run)
            raise ValueError(
                f"prompt {row} {where} with the padding token {tokenizer.pad_token!r}: give what the tokenizer "
                "returned, with its attention_mask, or lists of ids without padding"
            )


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

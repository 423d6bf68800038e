"""What may be passed as a prompt, a seed, a stop string: every way is the same ids, anything else one line."""

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from speedstack.runtime.decoding.prompts import (
    encode_text,
    integer,
    real,
    seeds_for,
    single_prompt,
    split_prompts,
    stop_strings,
)
from tests.runtime.decoding.tokenizers import TEXTS, byte_level, sentencepiece

IDS = [7, 8, 9]
ONE: dict[str, Any] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(7, 10),
    "NumPy integers": list(np.array(IDS, dtype=np.uint16)),
    "mixed integers": [7, np.int32(8), torch.tensor(9)],
    "array": np.array(IDS, dtype=np.int16),
    "tensor": torch.tensor(IDS, dtype=torch.int32),
    "list of tensors": list(torch.tensor(IDS)),
    "BatchEncoding": BatchEncoding({"input_ids": IDS, "attention_mask": [1, 1, 1]}),
    "dict": {"input_ids": tuple(IDS)},
    "mask of booleans": UserDict({"input_ids": np.array([1, *IDS]), "attention_mask": np.array([0, 1, 1, 1]) > 0}),
}
SEVERAL: dict[str, Any] = {
    "list of lists": [IDS, [5]],
    "array of lists": np.array([IDS, [5]], dtype=object),
    "list of everything": (np.array(IDS), torch.tensor([5])),
    "list of encodings": [BatchEncoding({"input_ids": IDS}), {"input_ids": torch.tensor([5])}],
    "padded lists": {"input_ids": [IDS, [1, 1, 5]], "attention_mask": [[1, 1, 1], [0, 0, 1]]},
    "padded right": {
        "input_ids": torch.tensor([IDS, [5, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    },
    "mask of tensors": {
        "input_ids": np.array([IDS, [1, 5, 1]]),
        "attention_mask": [torch.tensor([True] * 3), torch.tensor([False, True, False])],
    },
}


@pytest.mark.parametrize("prompt", ONE.values(), ids=ONE)
def test_one_prompt_in_every_way(prompt: Any) -> None:
    found, is_single = split_prompts(prompt)
    assert found == [IDS] and is_single and all(type(token) is int for token in found[0])
    assert single_prompt(prompt) == IDS
    assert split_prompts([prompt, "text"]) == ([IDS, "text"], False)


@pytest.mark.parametrize("prompts", SEVERAL.values(), ids=SEVERAL)
def test_several_prompts_in_every_way(prompts: Any) -> None:
    assert split_prompts(prompts) == ([IDS, [5]], False)
    with pytest.raises(ValueError, match="takes one prompt, and here are 2"):
        single_prompt(prompts)


def test_texts() -> None:
    assert split_prompts("7 8") == (["7 8"], True)
    assert split_prompts(np.str_("7")) == (["7"], True)
    for texts in (["a", "b"], ("a", "b"), np.array(["a", "b"])):
        assert split_prompts(texts) == (["a", "b"], False)


def test_a_batch_of_one_and_of_none() -> None:
    for batch in (torch.tensor([IDS]), np.array([IDS]), [IDS], {"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}):
        assert split_prompts(batch) == ([IDS], False) and single_prompt(batch) == IDS
    assert split_prompts([]) == ([], False) and single_prompt([]) == []
    nothing: list[Any] = [torch.tensor([], dtype=torch.long), np.array([], dtype=int), {"input_ids": []}]
    for empty in (*nothing, {"input_ids": [], "attention_mask": []}):
        assert split_prompts(empty) == ([[]], True)
    assert split_prompts([[], "x"]) == ([[], "x"], False)


def test_what_tokenizers_return() -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Paris."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    for options in ({}, {"return_dict": False}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        assert single_prompt(tokenizer.apply_chat_template(messages, **options), tokenizer) == ids
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for kind in (None, "pt", "np"):
            batch = tokenizer(list(TEXTS), padding=True, return_tensors=kind)
            assert split_prompts(batch, tokenizer) == ([tokenizer.encode(text) for text in TEXTS], False)
            for unmasked in ({"input_ids": batch["input_ids"]}, batch["input_ids"]):
                if kind is not None or isinstance(unmasked, dict):
                    where = "begins" if side == "left" else "ends"
                    with pytest.raises(ValueError, match=f"prompt 0 {where} with the padding token '<pad>'"):
                        split_prompts(unmasked, tokenizer)


def test_padding_that_is_bos_or_eos_too_is_told_from_it() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    pad = tokenizer.pad_token_id
    rows = [[pad, 7, 8], [pad, 9, 9]]  # every one begins a text
    assert split_prompts(torch.tensor(rows), tokenizer) == (rows, False)
    for rows in ([[pad, pad, 8], [pad, 9, 9]], [[pad, 7, 8], [7, 9, 9]], [[7, 8, pad], [7, 7, 8]]):
        with pytest.raises(ValueError, match="padding token"):
            split_prompts(np.array(rows), tokenizer)
        assert split_prompts(rows, tokenizer) == (rows, False), "lists are what they are"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "not NoneType"),
        (5, "not int"),
        (b"text", "not bytes"),
        ({7, 8}, "not set"),
        ((token for token in IDS), "not generator"),
        ([7, 8.0], "token 1 of a prompt is 8.0, which is no integer"),
        ([True, 7], "token 0 of a prompt is True"),
        ([7, torch.tensor(True)], r"token 1 of a prompt is tensor\(True\)"),
        ([np.float64(7)], "token 0"),
        ([7, "x"], "token 1 of a prompt is 'x'"),
        ([7, None], "token 1"),
        ([7, [8]], "token 1"),
        ([[7], 8], "prompt 1: a prompt is text.*not int"),
        (["x", None], "prompt 1: .*not NoneType"),
        ([["x", "y"]], "prompt 0 is itself a list of prompts"),
        ([[[7]]], "prompt 0 is itself a list"),
        ([torch.tensor([[7]])], "prompt 0 is itself a list"),
        (np.array(IDS, dtype=np.float32), "array of float32 with 1 dimensions"),
        (torch.tensor(IDS) > 7, "array of torch.bool with 1"),
        (torch.tensor([[[7]]]), "with 3 dimensions"),
        (torch.tensor(7), "with 0 dimensions"),
        (np.array([["a"]]), "with 2 dimensions"),
        ({"role": "user", "content": "x"}, "this one has role, content. Messages of a chat"),
        ([{"role": "user", "content": "x"}], "prompt 0: .*apply_chat_template"),
        ({}, "this one has nothing"),
        ({"input_ids": "text"}, "input_ids must be token ids, not str"),
        ({"input_ids": ["a", "b"]}, "input_ids must be token ids, not text"),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, "different shapes"),
        ({"input_ids": IDS, "attention_mask": 1}, "different shapes"),
        ({"input_ids": [IDS], "attention_mask": [[1, 1]]}, "different shapes"),
        ({"input_ids": [IDS], "attention_mask": torch.ones(1, 1, 3, 3)}, "different shapes"),
        ({"input_ids": [IDS], "attention_mask": torch.ones(1, 3, 3)}, "different shapes"),
        ({"input_ids": IDS, "attention_mask": ["1", "1", "0"]}, "different shapes"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1]}, "tokens in the middle"),
    ],
)
def test_anything_else_is_refused_in_one_line(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        split_prompts(prompt)
    assert "\n" not in str(error.value)


def test_text_gets_what_the_tokenizer_adds_and_no_second_bos() -> None:
    tokenizer = sentencepiece()
    bos = tokenizer.bos_token_id
    assert encode_text(TEXTS[0], tokenizer) == tokenizer(TEXTS[0]).input_ids
    assert encode_text(TEXTS[0], tokenizer)[:1] == [bos]
    assert encode_text("<s>" + TEXTS[0], tokenizer).count(bos) == 1
    assert encode_text(" <s>" + TEXTS[0], tokenizer).count(bos) == 2, "somebody asked for a second one"
    plain = byte_level()
    assert encode_text(TEXTS[0], plain) == plain(TEXTS[0]).input_ids
    plain.bos_token = None
    assert encode_text("<s>" + TEXTS[0], plain)[0] == bos


def test_seeds() -> None:
    for seed in (3, np.int64(3), torch.tensor(3), np.array(3)):
        assert seeds_for(seed, 2) == [3, 3]
    for seeds in ([3, 4], (3, np.uint8(4)), range(3, 5), np.array([3, 4]), torch.tensor([3, 4])):
        assert seeds_for(seeds, 2) == [3, 4]
    for bad in (1.0, True, None, "3", [1.0, 2], [True, 1], np.array([[3, 4]]), torch.tensor(3.0), {3: 4}):
        with pytest.raises(ValueError, match="seed must be an integer") as error:
            seeds_for(bad, 2)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        seeds_for(range(3), 2)


def test_stop_strings() -> None:
    assert stop_strings(None) == stop_strings([]) == ()
    assert (
        stop_strings("ab") == stop_strings(("ab",)) == stop_strings([np.str_("ab")]) == stop_strings({"ab"}) == ("ab",)
    )
    for bad in (5, [5], [None], b"ab", ["a", ["b"]], {"a": "b"}):
        with pytest.raises(ValueError, match="stop must be a string or a list of strings"):
            stop_strings(bad)
    for empty in ("", ["a", ""]):
        with pytest.raises(ValueError, match="must not be empty"):
            stop_strings(empty)


def test_numbers() -> None:
    assert integer("n", np.uint8(4)) == integer("n", torch.tensor(4)) == 4
    assert real("t", np.float32(0.5)) == real("t", torch.tensor(0.5)) == 0.5 and real("t", 1) == 1.0
    for bad in (True, None, "1", [1], torch.tensor([1, 2]), np.bool_(True), 1j):
        with pytest.raises(ValueError, match="t must be a number, not ") as error:
            real("t", bad)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="n must be an integer, not "):
            integer("n", bad)

"""Text and tokens of the engine as others see them: where texts end, special tokens, prompts of any type."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speedstack.quant.checkpoint import load_model
from speedstack.runtime import Engine, Generation
from speedstack.runtime.decoding.sequence import RunningSequence
from tests.runtime.decoding.tokenizers import sentencepiece

PROMPT = [10, 20, 30, 40]
NUM_NEW = 24


@pytest.fixture(scope="module")
def engine(tiny_packed_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_packed_dir, backend="reference", device="cpu")


def script(engine: Engine, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the engine write these tokens, whatever its model says."""

    def choose(sequence: RunningSequence, *row: object) -> int:
        return tokens[sequence.stats.num_new_tokens]

    monkeypatch.setattr(engine._decoder, "_choose", choose)


def read(engine: Engine, prompt: Any, **options: Any) -> tuple[list[str], Generation]:
    """Pieces of a stream, and its result."""
    stream = engine.stream(prompt, **options)
    pieces: list[str] = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_texts_end_where_transformers_ends_them(backend: Any, tiny_packed_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_packed_dir, tmp_path / "model")
    free = Engine.from_pretrained(path, backend=backend).generate(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True)
    chosen = sorted(set(free.tokens), key=free.tokens.index)[3:9:2]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": chosen[::-1], "pad_token_id": 1}))
    model: Any = load_model(path)
    with torch.no_grad():
        theirs = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False)[0, len(PROMPT) :]
    for drafter in (None, "ngram"):
        engine = Engine.from_pretrained(path, drafter, backend=backend)
        assert engine.spec.eos_token_ids == tuple(sorted([0, *chosen]))  # with the tokenizer's
        found = engine.generate(PROMPT, max_new_tokens=NUM_NEW)
        assert (found.finish_reason, found.tokens) == ("eos", theirs.tolist())
        assert found.text == engine.tokenizer.decode(found.tokens[:-1], skip_special_tokens=True)
        assert engine.generate(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True).tokens == free.tokens


@pytest.mark.parametrize(
    ("file", "value"), [("config.json", "0"), ("generation_config.json", [0, 1.5]), ("generation_config.json", 512)]
)
def test_malformed_end_tokens_are_one_line(file: str, value: Any, tiny_packed_dir: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_packed_dir, tmp_path / "model")
    (path / "generation_config.json").unlink(missing_ok=True)
    fields = json.loads((path / "config.json").read_text()) if file == "config.json" else {}
    (path / file).write_text(json.dumps(fields | {"eos_token_id": value}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file}.*eos_token_id") as error:
        Engine.from_pretrained(path)
    assert "\n" not in str(error.value)


def test_special_tokens_are_in_the_text_where_asked_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = engine.tokenizer
    words = tokenizer.encode("width of text", add_special_tokens=False)
    mask = tokenizer.mask_token_id
    tokens = [*words[:1], mask, *words[1:], mask, 0]
    script(engine, tokens, monkeypatch)
    for skips, text in ((True, "width of text"), (False, "w<|mask|>idth of text<|mask|>")):
        options: dict[str, Any] = {"max_new_tokens": NUM_NEW, "skip_special_tokens": skips}
        if not skips:
            text = tokenizer.decode(tokens[:-1])
        found = engine.generate(PROMPT, **options)
        assert (found.text, found.tokens, found.finish_reason) == (text, tokens, "eos")
        pieces, streamed = read(engine, PROMPT, **options)
        assert "".join(pieces) == streamed.text == text
        ended = engine.generate(PROMPT, stop="<|mask|>", **options)
        assert (ended.tokens, ended.finish_reason) == (tokens[:2], "stop")
        assert ended.text == tokenizer.decode(words[:1])


def test_a_text_goes_on_from_its_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of SentencePiece; a prompt in text has BOS, and the first word of the answer its space."""
    tokenizer = sentencepiece()
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    monkeypatch.setattr(engine, "spec", engine.spec.__class__(**{**vars(engine.spec), "eos_token_ids": (2,)}))
    tokens = [*tokenizer.encode("is 漢 Paris.", add_special_tokens=False), 2]
    script(engine, tokens, monkeypatch)
    prompt = tokenizer.encode("The capital")
    assert engine.encode("The capital") == prompt and prompt[0] == tokenizer.bos_token_id
    for given in ("The capital", prompt, tokenizer("The capital")):
        found = engine.generate(given, max_new_tokens=NUM_NEW)
        pieces, streamed = read(engine, given, max_new_tokens=NUM_NEW)
        assert found.text == "".join(pieces) == streamed.text == " is 漢 Paris."
        assert found.stats.num_prompt_tokens == len(prompt)
    half = tokenizer.encode("of 漢", add_special_tokens=False)
    script(engine, [half[-1], 2], monkeypatch)
    assert engine.generate(half[:-1], max_new_tokens=NUM_NEW).text == "漢"
    assert torch.equal(engine.score("The capital").logprobs, engine.score(prompt).logprobs)
    assert torch.equal(engine.logits("The capital"), engine.logits(prompt))


def test_every_call_takes_every_kind_of_prompt(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=4).tokens
    numbers: dict[str, Any] = {"max_new_tokens": np.int64(4), "temperature": np.float32(0)}
    for prompt in (tuple(PROMPT), np.array(PROMPT), torch.tensor(PROMPT), {"input_ids": PROMPT}):
        assert engine.generate(prompt, **numbers).tokens == expected
        assert read(engine, prompt, max_new_tokens=4)[1].tokens == expected
        assert len(engine.score(prompt).logprobs) == 3 and engine.logits(prompt).shape == (4, 512)
    for batch in (torch.tensor([PROMPT]), {"input_ids": [PROMPT], "attention_mask": [[1] * 4]}, [np.array(PROMPT)]):
        assert [one.tokens for one in engine.generate(batch, max_new_tokens=4)] == [expected]
        assert [len(one.logprobs) for one in engine.score(batch)] == [3]
        assert read(engine, batch, max_new_tokens=4)[1].tokens == expected and len(engine.logits(batch)) == 4
    padded = engine.tokenizer(["def f(x):", "x"], padding=True, return_tensors="pt")
    alone = [engine.generate(text, max_new_tokens=4).tokens for text in ("def f(x):", "x")]
    assert [one.tokens for one in engine.generate(padded, max_new_tokens=4, stop=None)] == alone
    drawn: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.0}
    seeds = [engine.generate(PROMPT, seed=seed, **drawn).tokens for seed in (5, np.int32(5), torch.tensor(5))]
    assert seeds[0] == seeds[1] == seeds[2] == engine.generate([PROMPT], seed=np.array([5]), **drawn)[0].tokens
    assert read(engine, PROMPT, seed=np.uint8(5), **drawn)[1].tokens == seeds[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [PROMPT, [1.5]]}, "prompt 1: token 0"),
        ({"prompts": [10, True]}, "token 1 of a prompt is True"),
        ({"prompts": "x", "seed": 1.0}, "seed must be an integer"),
        ({"prompts": "x", "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompts": "x", "stop": [5]}, "stop must be"),
        ({"prompts": "x", "temperature": None}, "temperature must be a number, not None"),
        ({"prompts": "x", "temperature": "0"}, "temperature must be a number"),
        ({"prompts": "x", "top_k": 2.0}, "top_k must be an integer"),
        ({"prompts": "x", "top_p": True}, "top_p must be a number"),
        ({"prompts": "x", "max_new_tokens": 4.0}, "max_new_tokens must be an integer"),
        ({"prompts": "x", "max_new_tokens": None}, "max_new_tokens must be an integer"),
        ({"prompts": torch.tensor([[10, 1], [10, 11]])}, "prompt 0 ends with the padding token"),
    ],
)
def test_other_types_are_refused_in_one_line(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        engine.generate(**({"max_new_tokens": 4} | options))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="takes one prompt, and here are 2"):
        engine.logits([PROMPT, PROMPT])

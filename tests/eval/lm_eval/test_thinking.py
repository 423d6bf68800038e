"""Reasoning models: what follows the end of thinking is scored, as lm-eval's adapters cut it."""

import logging
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.eval.lm_eval.thinking import find_think_end, strip_thinking
from speedstack.runtime import Engine

PROMPT = "class Queue:\n    def get(self):\n        "
NUM_NEW = 28


def asked(**gen_kwargs: Any) -> list[Instance]:
    arguments = (PROMPT, {"max_gen_toks": NUM_NEW, "until": [], "do_sample": False} | gen_kwargs)
    instance = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
    instance.task_name = "t"
    return [instance]


@pytest.fixture(scope="module")
def tokens(engine: Engine) -> list[int]:
    """What the model writes after the prompt."""
    lm = EngineLM(engine, progress=False)
    return engine.generate(lm.tok_encode(PROMPT), max_new_tokens=NUM_NEW, ignore_eos=True).tokens


def split_at(engine: Engine, tokens: list[int], place: int) -> tuple[str, str, str]:
    """Text before the token at `place`, its own, and the one behind it."""
    return tuple(engine.tokenizer.decode(part) for part in (tokens[:place], [tokens[place]], tokens[place + 1 :]))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def end(engine: Engine, tokens: list[int]) -> int:
    """Place of a token that is there once, as its text is: what "ends the thinking"."""
    for place in range(6, len(tokens) - 6):
        before, own, behind = split_at(engine, tokens, place)
        if tokens.count(tokens[place]) == 1 and own.strip() and (before + own + behind).count(own) == 1:
            return place
    raise AssertionError("the model repeats itself: take another prompt")


@pytest.mark.parametrize("form", ["id", "digits", "text"])
@pytest.mark.parametrize("stops", [False, True])
def test_the_answer_is_the_hugging_face_adapters(
    engine: Engine,
    hf_lm: HFLM,
    tokens: list[int],
    end: int,
    form: str,
    stops: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thought, text, rest = split_at(engine, tokens, end)
    forms: dict[str, str | int] = {"id": tokens[end], "digits": str(tokens[end]), "text": text}
    think_end = forms[form]
    answer = rest.lstrip()
    # A stop string that the thinking has not: with one that it has, the Hugging Face adapter would score the thinking.
    pieces = [answer[i : i + 2] for i in range(1, len(answer) - 1)]
    until = [next(piece for piece in pieces if piece not in thought + text)] if stops else []
    monkeypatch.setattr(hf_lm, "think_end_token", int(think_end) if form == "digits" else think_end)
    lm = EngineLM(engine, progress=False, think_end=think_end)
    (ours,) = lm.generate_until(asked(until=until), disable_tqdm=True)
    assert [ours] == hf_lm.generate_until(asked(until=until), disable_tqdm=True)
    assert ours == (answer.partition(until[0])[0] if until else answer)
    assert lm.counts["t"].num_without_answer == 0 and lm.counts["t"].num_unstopped == 0


def test_what_ends_an_answer_may_occur_in_the_thinking(engine: Engine, tokens: list[int], end: int) -> None:
    thought, _, rest = split_at(engine, tokens, end)
    in_thinking = thought[2:5]
    lm = EngineLM(engine, progress=False, think_end=tokens[end])
    (ours,) = lm.generate_until(asked(until=[in_thinking]), disable_tqdm=True)
    assert ours == rest.lstrip().partition(in_thinking)[0] and ours


def test_thinking_that_does_not_end_is_scored_as_lm_eval_does_and_said(
    engine: Engine, hf_lm: HFLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hf_lm, "think_end_token", "</think>")
    lm = EngineLM(engine, progress=False, think_end="</think>")
    with caplog.at_level(logging.WARNING):
        ours = lm.generate_until(asked() * 2, disable_tqdm=True)
    assert ours == hf_lm.generate_until(asked() * 2, disable_tqdm=True)
    assert "t: 2 of 2 generations did not come to the end of thinking, '</think>'" in caplog.text
    assert lm.counts["t"].num_without_answer == 2


def test_the_last_end_counts(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    text = "a </end> b </end>\n c"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert strip_thinking(tokenizer, ids, text, "</end>") == ("c", True)
    assert strip_thinking(tokenizer, [7, 300, 8, 300, 9], "unused", 300) == (tokenizer.decode([9]).lstrip(), True)
    assert strip_thinking(tokenizer, ids, " c", 511) == ("c", False)


def test_special_tokens_are_found_by_their_id(engine: Engine) -> None:
    assert find_think_end(engine.tokenizer, "<|mask|>") == engine.tokenizer.mask_token_id
    assert find_think_end(engine.tokenizer, "</think>") == "</think>"
    assert find_think_end(engine.tokenizer, None) is None
    with pytest.raises(ValueError, match="the end of thinking is token 9000, and the tokenizer has 512 tokens"):
        EngineLM(engine, think_end="9000")
    with pytest.raises(ValueError, match="the end of thinking is empty"):
        EngineLM(engine, think_end="")


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_chats_are_rendered_as_the_hugging_face_adapter_does(
    engine: Engine, hf_lm: HFLM, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)  # of both
    monkeypatch.setattr(hf_lm, "chat_template_args", kwargs)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    lm = EngineLM(engine, progress=False, chat_template_kwargs=kwargs)
    rendered = lm.apply_chat_template(chat)
    assert rendered == hf_lm.apply_chat_template(chat) and rendered.endswith("<think></think>") == bool(kwargs)


class Task:
    """What an lm-eval task says of itself."""

    def __init__(self, name: str, output_type: str) -> None:
        self.task_name, self.OUTPUT_TYPE = name, output_type

    def dump_config(self) -> dict[str, Any]:
        return {}


def test_thinking_in_vain_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        EngineLM(engine, chat_template_kwargs={"enable_thinking": False})
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)
    with pytest.raises(ValueError, match=r"'enable_thoughts', which the chat template of .* never reads"):
        EngineLM(engine, chat_template_kwargs={"enable_thoughts": False})
    on = {"enable_thinking": True}
    with pytest.raises(ValueError, match="say what ends the thinking with --think-end-token"):
        EngineLM(engine, chat_template_kwargs=on)
    tasks = [Task("sums", "generate_until"), Task("pick", "multiple_choice"), Task("fluency", "loglikelihood_rolling")]
    with pytest.raises(ValueError, match="tasks have no text to think in: fluency, pick: leave them out"):
        EngineLM(engine, tasks=tasks, chat_template_kwargs=on, think_end="</think>")
    EngineLM(engine, tasks=tasks[:1], chat_template_kwargs=on, think_end="</think>")

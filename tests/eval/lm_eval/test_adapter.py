"""The lm-eval adapter gives what lm-eval's own Hugging Face adapter gives on the same weights."""

import copy
import logging

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.runtime import Engine
from speedstack.runtime.scoring import score_continuations

# Float32 products summed in another order, over up to 700 tokens.
LOGPROB_TOLERANCE_NATS = 1e-4


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm(engine: Engine) -> EngineLM:
    return EngineLM(engine, progress=False)


def test_loglikelihood_equals_the_hugging_face_adapter(lm: EngineLM, hf_lm: HFLM) -> None:
    pairs = [
        ("def wrap(text, width):\n", "    return text"),
        ("import", " textwrap"),
        ("", "class TextWrapper:"),
        ("    lines ", " = []"),
        ("a" * 600, " = b"),  # loses its beginning
    ]
    ours = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    theirs = hf_lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (logprob, is_greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, abs=LOGPROB_TOLERANCE_NATS)
        assert is_greedy == expected_greedy


def test_rolling_equals_the_hugging_face_adapter_over_several_windows(
    lm: EngineLM, hf_lm: HFLM, documents: dict[str, str]
) -> None:
    texts = [("short",), (documents["bisect.py"][:2500],), ("",)]
    assert len(lm.tok_encode(texts[1][0])) > 2 * lm.max_length  # three windows
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    theirs = hf_lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts[:2]), disable_tqdm=True)
    # It adds up in float32, whose steps at ten thousand nats are of a thousandth.
    assert ours[:2] == pytest.approx(theirs, abs=LOGPROB_TOLERANCE_NATS, rel=2.0**-23)
    assert ours[2] == 0.0


def test_every_token_is_scored_once(lm: EngineLM, engine: Engine) -> None:
    text = "x = 1\n" * 30
    ids = lm.tok_encode(text)
    assert len(ids) < engine.max_length
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    logprobs = engine.score([lm.eot_token_id, *ids]).logprobs
    assert len(logprobs) == len(ids) and total == pytest.approx(float(logprobs.double().sum()), rel=1e-12)


def test_generation_equals_the_hugging_face_adapter(lm: EngineLM, hf_lm: HFLM) -> None:
    greedy = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    # The stop string of the second group occurs in what the model writes after the third context.
    contexts = [("def f(x):\n    return", greedy), ("import os", greedy), ("class A", {**greedy, "until": ["e"]})]
    ours = lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert ours == hf_lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert all("\n" not in text for text in ours[:2]) and "e" not in ours[2]
    assert any(ours)


def test_special_tokens_are_left_out_as_the_hugging_face_adapter_leaves_them_out(
    engine: Engine, hf_lm: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks of a template or a channel, which here are some of the tokens that the model writes anyway."""
    free = engine.generate("import os", max_new_tokens=12).tokens
    tokenizer = copy.deepcopy(engine.tokenizer)
    marks = [tokenizer.convert_ids_to_tokens(token) for token in dict.fromkeys(free[2:5])]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    for adapter in (engine, hf_lm):
        monkeypatch.setattr(adapter, "tokenizer", tokenizer)
    lm = EngineLM(engine, progress=False)
    contexts = [
        (text, {"until": until, "max_gen_toks": 12})
        for text in ("import os", "def f(x):")
        for until in ([], [marks[-1]], [tokenizer.decode(free[5:6])])
    ]
    ours = lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert ours == hf_lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert ours[0] and ours[0] != tokenizer.decode(free)


def test_sampling_takes_temperature_and_seed(engine: Engine) -> None:
    contexts = [("def f(x):", {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0})]
    texts = [
        EngineLM(engine, seed=seed, progress=False).generate_until(requests("generate_until", *contexts), True)[0]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_drafter_changes_no_answer(lm: EngineLM, drafting_engine: Engine) -> None:
    contexts = [(text, {"until": ["\n\n"], "max_gen_toks": 24}) for text in ("def f(x):", "import os", "class A")]
    drafted = EngineLM(drafting_engine, progress=False)
    ours = drafted.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert ours == lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True)


def test_long_prompts_keep_their_end_and_say_so(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    lm = EngineLM(engine, progress=False)
    end = "def f(x):\n    return"
    settings = {"until": [], "max_gen_toks": 24}
    with caplog.at_level(logging.WARNING):
        (long,) = lm.generate_until(requests("generate_until", ("pass\n" * 300 + end, settings)), disable_tqdm=True)
    assert "1 texts lost their beginning" in caplog.text
    kept = lm.tok_encode("pass\n" * 300 + end)[-(lm.max_length - 24) :]
    assert long == lm.engine.generate(kept, max_new_tokens=24).text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation setting num_beams is 4, which the engine does not compute: drop it"),
        ({"max_gen_toks": 256}, "max_gen_toks is 256, but prompt and text share 256 tokens"),
        ({"max_length": 257}, "max_length is 257, but prompt and text share 256 tokens"),
        ({"max_length": 1}, "max_length 1 leaves no room after a prompt of 1 tokens: set max_gen_toks instead"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
    ],
)
def test_settings_the_engine_does_not_have_are_refused(lm: EngineLM, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests("generate_until", ("x", {"max_gen_toks": 8} | settings)), disable_tqdm=True)


def test_a_continuation_without_room_for_context_is_refused(lm: EngineLM) -> None:
    with pytest.raises(ValueError, match="leaves no room for context: the engine holds 256 tokens"):
        lm.loglikelihood(requests("loglikelihood", ("x", "y = 1\n" * 200)), disable_tqdm=True)


def test_a_continuation_without_a_token_is_refused(lm: EngineLM) -> None:
    # It would score a probability of one, and win every multiple choice.
    with pytest.raises(ValueError, match="the continuation '' has no token of its own"):
        lm.loglikelihood(requests("loglikelihood", ("x", "")), disable_tqdm=True)


def test_a_model_without_text_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "tokenizer", None)
    with pytest.raises(ValueError, match="save a tokenizer into the model directory"):
        EngineLM(engine)


def test_one_text_is_computed_once_however_often_it_is_asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = EngineLM(engine, progress=False)
    asked: list[int] = []

    def count(engine: Engine, pairs: list) -> object:
        asked.append(len(pairs))
        return score_continuations(engine, pairs)

    monkeypatch.setattr("speedstack.eval.lm_eval.worker.score_continuations", count)
    pair = ("import", " textwrap")
    first = lm.loglikelihood(requests("loglikelihood", pair, pair), disable_tqdm=True)
    assert first[0] == first[1] and asked == [1]
    assert lm.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True) == first[:1] and asked == [1]
    assert (lm.counts[""].num_requests, lm.counts[""].num_cached) == (3, 1)


def test_samples_of_one_prompt_differ_and_repeat(engine: Engine) -> None:
    context = ("def f(x):", {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0})
    runs = [
        EngineLM(engine, seed=5, progress=False).generate_until(requests("generate_until", *[context] * 3), True)
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_a_task_that_never_stops_is_named(lm: EngineLM, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"until": ["never written"], "max_gen_toks": 2}
    instances = requests("generate_until", ("def f(", settings), ("class A", settings))
    for instance in instances:
        instance.task_name = "endless"
    with caplog.at_level(logging.WARNING):
        lm.generate_until(instances, disable_tqdm=True)
    assert "endless: not one of 2 generations came to a stop string" in caplog.text
    assert lm.counts["endless"].num_unstopped == 2


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_chat_template_is_the_tokenizers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = EngineLM(engine, progress=False)
    user = {"role": "user", "content": "x = 1"}
    with pytest.raises(ValueError, match="has no chat template: evaluate without --chat-template"):
        lm.apply_chat_template([user])
    monkeypatch.setattr(engine.tokenizer, "chat_template", CHAT_TEMPLATE)
    assert lm.apply_chat_template([user]) == "<user>x = 1<assistant>"
    answered = [user, {"role": "assistant", "content": "y ="}]
    assert lm.apply_chat_template(answered, add_generation_prompt=False).endswith("<assistant>y =")
    with caplog.at_level(logging.WARNING):
        assert lm.apply_chat_template([{"role": "system", "content": "be brief"}, user]) == "<user>x = 1<assistant>"
    assert "no place for a system message" in caplog.text


def test_special_tokens_are_added_as_the_hugging_face_adapter_adds_them(
    engine: Engine, hf_lm: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = EngineLM(engine, progress=False)
    plain = engine.tokenizer.encode("x = 1", add_special_tokens=False)
    original = engine.tokenizer.encode

    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([0] if add_special_tokens else []), *original(text, add_special_tokens=False)]

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    assert lm.tok_encode("x = 1") == [0, *plain] == hf_lm.tok_encode("x = 1")
    marked = "<|endoftext|>x = 1"
    assert lm.tok_encode(marked) == [0, *plain] == hf_lm.tok_encode(marked)
    assert lm.tok_encode("x = 1", add_special_tokens=False) == plain

"""Prompts from files: what the template makes of them, how they are split, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from speedstack.train.config import DrafterConfig
from speedstack.train.prompts import PromptSet, prepare_prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chat_tokenizer(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(prompts: dict[str, Any], **drafter: Any) -> DrafterConfig:
    section = {"prompts": prompts, "num_sequences": 100, "num_eval_sequences": 2, "prompt_length": 30, **drafter}
    return DrafterConfig.model_validate(
        {"data": {"sequence_length": 64}, "drafter": {"block_size": 4, "written_fraction": 1.0, **section}}
    )


TEXTS = [{"prompt": f"def f{i}(x):", "response": f" return {i}"} for i in range(20)]
CHAT = [{"messages": [{"role": "user", "content": "say 0"}, {"role": "assistant", "content": "it is 0"}]}]


def prepare(tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]] | Path, **options: Any) -> PromptSet:
    source = rows if isinstance(rows, Path) else lines(tmp_path / "prompts.jsonl", rows)
    drafter = options.pop("drafter", {})
    config = make_config({"source": str(source), **options}, **drafter)
    return prepare_prompts(tmp_path / "prompts", config, tokenizer, seed=3)


def test_every_prompt_is_on_one_side(tmp_path, tiny_tokenizer):
    prompts = prepare(tmp_path, tiny_tokenizer, TEXTS, heldout_fraction=0.1)
    texts = [tiny_tokenizer.decode(c.prompt) for c in (*prompts.heldout, *prompts.train)]
    assert len(prompts.heldout) == 2 and sorted(texts) == sorted(row["prompt"] for row in TEXTS)
    assert all(c.response == [] for c in (*prompts.heldout, *prompts.train))
    assert prompts.facts["num_train"] == 18
    assert prepare(tmp_path, tiny_tokenizer, TEXTS, heldout_fraction=0.1) == prompts


def test_held_out_prompts_of_another_file_are_not_trained_on(tmp_path, tiny_tokenizer):
    apart = lines(tmp_path / "apart.jsonl", [TEXTS[4], TEXTS[4], TEXTS[5], TEXTS[6]])
    with pytest.warns(UserWarning, match="left out: 3 with a held-out prompt"):
        prompts = prepare(tmp_path, tiny_tokenizer, TEXTS, heldout_source=str(apart))
    assert [tiny_tokenizer.decode(c.prompt) for c in prompts.heldout] == ["def f4(x):", "def f5(x):"]
    assert len(prompts.train) == 18


def test_a_fraction_takes_the_sequences_asked_for(tmp_path, tiny_tokenizer):
    prompts = prepare(tmp_path, tiny_tokenizer, TEXTS, heldout_fraction=0.05, drafter={"num_sequences": 7})
    assert (len(prompts.heldout), len(prompts.train)) == (1, 7)


def test_chats_go_through_the_template(tmp_path, chat_tokenizer):
    rows = [{"messages": [{"role": "system", "content": "be brief"}, *CHAT[0]["messages"][:1]]}, *CHAT]
    prompts = prepare(tmp_path, chat_tokenizer, rows, field="messages", drafter={"prompt_length": 60})
    texts = {chat_tokenizer.decode(c.prompt) for c in (*prompts.heldout, *prompts.train)}
    opening, end = "<user>say 0<|endoftext|>\n<assistant>", "<|endoftext|>\n"
    assert texts == {f"<system>be brief{end}{opening}", opening}  # the answer is left to the target


def test_text_as_a_users_message(tmp_path, chat_tokenizer):
    prompts = prepare(tmp_path, chat_tokenizer, TEXTS[:2], as_chat=True)
    assert chat_tokenizer.decode(prompts.train[0].prompt).startswith("<user>def f")


def test_given_answers_are_taken_as_they_are(tmp_path, chat_tokenizer):
    prompts = prepare(tmp_path, chat_tokenizer, TEXTS[:3], responses="given")
    pairs = {chat_tokenizer.decode(c.prompt): chat_tokenizer.decode(c.response) for c in prompts.train}
    assert len(pairs) == 2 and pairs.items() <= {row["prompt"]: row["response"] for row in TEXTS[:3]}.items()


def test_a_given_answer_of_a_chat_ends_with_the_end_token(tmp_path, chat_tokenizer):
    rows = [{"messages": [*CHAT[0]["messages"], *CHAT[0]["messages"]]}, {"messages": CHAT[0]["messages"]}]
    prompts = prepare(
        tmp_path, chat_tokenizer, rows, field="messages", responses="given", drafter={"prompt_length": 60}
    )
    both = [*prompts.heldout, *prompts.train]
    assert {chat_tokenizer.decode(c.response) for c in both} == {"it is 0<|endoftext|>"}
    assert sorted(chat_tokenizer.decode(c.prompt).count("it is 0") for c in both) == [0, 1]


def test_empty_and_long_prompts_are_left_out_and_counted(tmp_path, tiny_tokenizer):
    rows = [{"prompt": " \n"}, {"prompt": "x = 1\n" * 40}, {"prompt": ""}, *TEXTS[:4]]
    with pytest.warns(UserWarning, match="left out: 2 empty, 1 longer than 30 tokens"):
        prompts = prepare(tmp_path, tiny_tokenizer, rows)
    assert len(prompts.heldout) + len(prompts.train) == 4


def test_prompts_are_kept_as_they_were_made(tmp_path, chat_tokenizer):
    """A template may print the date: what is on disk stays, while the settings are the same."""
    chat_tokenizer.chat_template = "{{ strftime_now('%H:%M:%S.%f') }}" + TEMPLATE
    rows = [{"messages": [{"role": "user", "content": "now"}]}, *CHAT]
    first = prepare(tmp_path, chat_tokenizer, rows, field="messages", drafter={"prompt_length": 60})
    assert prepare(tmp_path, chat_tokenizer, rows, field="messages", drafter={"prompt_length": 60}) == first


@pytest.mark.parametrize("change", ["chat_template_sha256", "source_sha256", "field", "prompt_length"])
def test_prompts_made_with_other_settings_are_refused(tmp_path, chat_tokenizer, change):
    rows = [row | {"other": row["prompt"]} for row in TEXTS]
    prepare(tmp_path, chat_tokenizer, rows, as_chat=True)
    options: dict[str, Any] = {"as_chat": True}
    if change == "chat_template_sha256":
        chat_tokenizer.chat_template = TEMPLATE.replace("<assistant>", "<model>")
    elif change == "source_sha256":
        rows[3]["prompt"] += " "
    elif change == "field":
        options["field"] = "other"
    else:
        options["drafter"] = {"prompt_length": 31}
    with pytest.raises(ValueError, match=f"made with another {change}: choose another drafter.text") as caught:
        prepare(tmp_path, chat_tokenizer, rows, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "no usable prompt for evaluation"),
        ('{"prompt": ""}\n', {}, "no usable prompt for evaluation: 1 empty"),
        (json.dumps({"prompt": "x = 1\n" * 40}), {}, "no usable prompt for evaluation: 1 longer than 30 tokens"),
        ('{"prompt": "one"}\n', {}, "no usable prompt for training"),
        ('{"prompt": "one"}\n\n{"text": "two"}\n', {}, r"line 3 has no field 'prompt'; its fields are text"),
        ('{"prompt": "one"}\n{"prompt": \n', {}, "line 2 is not JSON"),
        ("[1]\n", {}, "line 1 is not a JSON object"),
        ('{"prompt": 3}\n', {}, "line 1: 'prompt' is neither text nor messages"),
        ('{"prompt": [{"role": "user"}]}\n', {}, "line 1: 'prompt' is neither text nor messages"),
        (
            '{"prompt": [{"role": "user", "content": "one"}]}\n',
            {},
            "is a chat, and .* has no chat template",
        ),
        ('{"prompt": "one"}\n', {"as_chat": True}, "has no chat template"),
        ('{"prompt": "one"}\n', {"responses": "given"}, "line 1 has no field 'response'"),
        ('{"prompt": "one"}\n', {"split": "test"}, "has no split 'test'"),
        ('{"prompt": "one", "response": 1}\n', {"responses": "given"}, "line 1: 'response' is not text"),
        (
            '{"prompt": [{"role": "user", "content": "one"}]}\n',
            {"responses": "given"},
            "the last message is not the assistant's",
        ),
    ],
)
def test_bad_prompts_are_one_line_and_leave_nothing(tmp_path, tiny_tokenizer, text, options, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        prepare(tmp_path, tiny_tokenizer, file, **options)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_source_that_is_nowhere_is_one_line(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="there is no file or directory"):
        prepare(tmp_path, tiny_tokenizer, tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("prompts", "drafter", "message"),
    [
        ({"field": "text"}, {}, "field needs source"),
        ({"source": "x", "heldout_split": "test"}, {}, "heldout_split needs heldout_source"),
        ({"source": "x", "responses": "given"}, {"temperatures": [0.7]}, "answers that the target writes"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(prompts, drafter, message):
    with pytest.raises(ValueError, match=message):
        make_config(prompts, **drafter)

"""Prompts from files: what the template makes of them, how they are split, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.data.prompts import PromptSet, prepare_prompts

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
    tmp_path.mkdir(exist_ok=True)
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
    with pytest.warns(UserWarning, match=r"apart\.jsonl left out: 1 with a held-out prompt"):
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


def test_a_given_answer_ends_with_whichever_token_ends_the_targets(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "<|pad|>")
    (tmp_path / "file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHAT * 2))
    config = make_config({"source": str(tmp_path / "file.jsonl"), "responses": "given", "heldout_fraction": 0.9})
    config = config.model_copy(update={"drafter": config.drafter.model_copy(update={"written_fraction": 0.0})})
    for end_ids, end in (((), "<|pad|>\n"), ((1, 7), "<|pad|>")):
        prompts = prepare_prompts(tmp_path / str(len(end_ids)), config, chat_tokenizer, 0, end_ids)
        assert chat_tokenizer.decode(prompts.heldout[0].response) == f"it is 0{end}"
    with pytest.raises(ValueError, match="made with another end_ids"):
        prepare_prompts(tmp_path / "0", config, chat_tokenizer, 0, (1, 7))


def test_empty_and_long_prompts_are_left_out_and_counted(tmp_path, tiny_tokenizer):
    rows = [{"prompt": " \n"}, {"prompt": "x = 1\n" * 40}, {"prompt": ""}, *TEXTS]
    message = (
        "2 of 23 rows of .* cannot be used .*: 'prompt' is empty .and 1 more.; of 23 rows .* out: 1 longer than 30 tok"
    )
    with pytest.warns(UserWarning, match=message):
        prompts = prepare(tmp_path, tiny_tokenizer, rows)
    assert len(prompts.heldout) + len(prompts.train) == 20


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


DIRTY = [
    {"prompt": None},
    {"other": "x"},
    {"prompt": 3},
    {"prompt": [{"role": "critic", "content": "x"}]},
    {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    {"prompt": [100_000], "response": "x"},
    {"prompt": "no answer"},
    {"prompt": "x", "response": 1},
    {"prompt": "x", "response": " "},
    {"prompt": [{"role": "user", "content": "one"}]},
]


@pytest.mark.parametrize("row", DIRTY)
def test_one_row_that_cannot_be_used_is_left_out_and_named(row, tmp_path, chat_tokenizer):
    chats = [{"prompt": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x"}]} for i in range(9)]
    rows: list[dict[str, Any]] = [*TEXTS[:9], *chats, row]
    with pytest.warns(UserWarning, match=r"1 of 19 rows of .*prompts\.jsonl cannot be used .*prompts\.jsonl line 19: "):
        prompts = prepare(tmp_path, chat_tokenizer, rows, responses="given")
    assert len(prompts.heldout) + len(prompts.train) == 18


def test_answers_of_any_spelling(tmp_path, chat_tokenizer):
    """Beside a prompt that is a chat, as one message or as text; and its last message is more than its content."""
    chat_tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    first, second, third = ([{"role": "user", "content": f"say {i}"}] for i in range(3))
    call = {"name": "look", "arguments": "{}"}
    rows: list[dict[str, Any]] = [
        {"prompt": first, "response": [{"from": "gpt", "value": "it is 0"}]},
        {"prompt": second, "response": "it is 1"},
        {"prompt": [*third, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"prompt": chat_tokenizer.encode("def f"), "response": "(x):"},
    ]
    prompts = prepare(tmp_path, chat_tokenizer, rows, responses="given")
    texts = {chat_tokenizer.decode(c.response) for c in (*prompts.heldout, *prompts.train)}
    end = chat_tokenizer.eos_token
    assert texts == {f"it is 0{end}", f"it is 1{end}", f"[{{'name': 'look', 'arguments': {{}}}}]{end}", "(x):"}


def test_an_answer_has_the_tokens_that_follow_its_prompt(tmp_path):
    """A tokenizer of whole words begins every text that it is given with a blank."""
    words = {"\u2581a": 0, "\u2581b": 1, "\u2581": 2, "b": 3, "a": 4, "?": 5}
    raw = Tokenizer(models.BPE(vocab=words | {"x": 6}, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="x"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    rows = [{"prompt": f"a{'?' * i}", "response": "b b"} for i in range(1, 4)]
    prompts = prepare(tmp_path, tokenizer, rows, responses="given")
    assert all(c.response == [3, 1] and c.prompt[0] == 0 for c in (*prompts.heldout, *prompts.train))


def test_less_than_asked_for_and_answers_that_are_cut_are_said(tmp_path, tiny_tokenizer):
    rows = [row | {"response": " y = 2\n" * 40} for row in TEXTS]
    with pytest.warns(UserWarning) as caught:
        prompts = prepare(tmp_path, tiny_tokenizer, rows, responses="given")
    said = [str(warning.message).removeprefix(str(tmp_path)) for warning in caught]
    num_train = len(prompts.train)
    assert f"/prompts.jsonl gives {num_train} of 100 prompts (drafter.num_sequences)" in said
    assert any(text.startswith(f"{num_train} given answers of") and "sequence_length 64" in text for text in said)


def test_how_much_dirt_is_borne_decides_nothing_that_is_kept(tmp_path, tiny_tokenizer):
    first = prepare(tmp_path, tiny_tokenizer, TEXTS)
    assert prepare(tmp_path, tiny_tokenizer, TEXTS, max_unusable_fraction=0.5) == first


def test_variables_of_the_template_are_part_of_what_was_made(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE + "{% if style is defined %}<{{ style }}>{% endif %}"
    terse = prepare(tmp_path / "a", chat_tokenizer, TEXTS, as_chat=True, chat_template_kwargs={"style": "terse"})
    assert chat_tokenizer.decode(terse.train[0].prompt).endswith("<assistant><terse>")
    assert terse.facts["chat_template_kwargs"] == {"style": "terse"}
    with pytest.raises(ValueError, match="made with another chat_template_kwargs: choose another"):
        prepare(tmp_path / "a", chat_tokenizer, TEXTS, as_chat=True)
    with pytest.raises(ValueError, match="for chats, and no prompt is one"):
        prepare(tmp_path / "b", chat_tokenizer, TEXTS, chat_template_kwargs={"style": "terse"})


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "no usable prompt for evaluation"),
        ('{"prompt": ""}\n', {}, r"1 of 1 rows of .* more than max_unusable_fraction 0\.1 bears: .* line 1: .* empty"),
        ('{"prompt": ""}\n', {"max_unusable_fraction": 1.0}, "no usable prompt for evaluation: 1 of 1 rows .* line 1"),
        (
            json.dumps({"prompt": "x = 1\n" * 40}),
            {},
            "no usable prompt for evaluation: of 1 rows .* longer than 30 tokens",
        ),
        ('{"prompt": "one"}\n', {}, "no usable prompt for training"),
        (
            '{"prompt": "one"}\n\n{"a": "two"}\n',
            {"field": "prompt"},
            r"line 3: has no field 'prompt'; its fields are a",
        ),
        ('{"prompt": "one"}\n{"prompt": \n', {}, "line 2: not JSON"),
        (
            '{"prompt": [{"role": "user", "content": "one"}]}\n',
            {},
            "the tokenizer of .* has no chat template",
        ),
        ('{"prompt": "one"}\n', {"as_chat": True}, "has no chat template"),
        ('{"prompt": "one"}\n', {"responses": "given"}, "line 1: has no field 'response'"),
        ('{"prompt": "one"}\n', {"split": "test"}, "has no split 'test'"),
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
        ({"source": "x", "heldout_source": "y", "heldout_fraction": 0.5}, {}, "heldout_fraction is of source"),
        ({"source": "x", "response_field": "answer"}, {}, "response_field has answers that are given"),
        ({"source": "x", "responses": "given"}, {"temperatures": [0.7]}, "answers that the target writes"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(prompts, drafter, message):
    with pytest.raises(ValueError, match=message):
        make_config(prompts, **drafter)

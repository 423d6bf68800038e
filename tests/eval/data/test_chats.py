"""Chats in the spellings that people have, and what a chat template makes of them or refuses."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from speedstack.eval.data.chat_template import ChatTemplate
from speedstack.eval.data.chats import Chat, prompt_of
from speedstack.eval.data.rows import UnusableRow

USER = {"role": "user", "content": "two?"}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
# Thinking is kept in the turn that is not over, as Qwen3 does, and dropped from earlier ones.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> PreTrainedTokenizerFast:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    copy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    copy.chat_template = THINKING
    return copy


def chat(*messages: dict[str, Any], **row: Any) -> Chat:
    found = prompt_of("here", {"messages": list(messages), **row})
    assert isinstance(found, Chat)
    return found


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": [USER]}, [("user", "two?")]),
        ({"conversations": '[{"from": "human", "value": "two?"}]'}, [("user", "two?")]),
        ({"messages": [USER | {"from": "human", "value": "two?"}]}, [("user", "two?")]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    {"from": "Human", "value": "two?"},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "2", "weight": None},
                ]
            },
            [("system", "be brief"), ("user", "two?"), ("tool", "2"), ("assistant", "2")],
        ),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "tw"}, {"type": "input_text", "text": "o?"}]}]},
            [("user", "two?")],
        ),
        ({"messages": [USER | {"content": ["two", {"text": "?", "type": None}]}]}, [("user", "two?")]),
        (
            {"conversation": [USER, {"role": "assistant", "content": None, "reasoning_content": "hm"}]},
            [("user", "two?"), ("assistant", "")],
        ),
        ({"messages": None, "turns": [USER]}, [("user", "two?")]),
    ],
)
def test_messages_in_every_spelling(row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    found = prompt_of("here", row)
    assert isinstance(found, Chat)
    assert [(message["role"], message["content"]) for message in found.messages] == messages
    assert all(None not in message.values() for message in found.messages)


def test_what_is_no_chat_is_text_or_ids() -> None:
    assert prompt_of("here", {"prompt": None, "turns": ["x", "y"]}) == "x"
    assert prompt_of("here", {"prompt": [4, 5], "text": "x"}) == [4, 5]
    assert prompt_of("here", {"prompt": [4, 5], "text": "x"}, "text") == "x"


def test_tool_calls_have_objects_as_arguments() -> None:
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    tools = '[{"type": "function", "function": {"name": "look"}}]'
    found = chat(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, old, tools=tools)
    assert found.messages[1]["tool_calls"] == [CALL | {"function": {"name": "look", "arguments": {"at": "sky"}}}]
    assert found.messages[2]["tool_calls"] == [{"name": "look", "arguments": {"at": "sky"}}]
    assert found.tools == [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "x"}, "has none of the fields messages, .*; its fields are answer"),
        ({"prompt": 5}, "'prompt' is neither text nor messages, turns or token ids"),
        ({"prompt": [True]}, "'prompt' is neither"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"prompt": "\ud83d"}, "has half of a surrogate pair"),
        ({"messages": [{"content": "x"}]}, "a message has no role"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "a message has the role 'critic'"),
        ({"messages": [USER, {"role": "tool", "content": None}]}, r"the content of message 2 \(tool\) is null"),
        ({"messages": [USER, {"role": "assistant"}]}, "the content of message 2"),
        ({"messages": [USER | {"content": {"a": 1}}]}, "message 1 is neither text nor parts"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}]}, "a part of type 'image_url'"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 3}]}]}, "a part that is no text"),
        ({"messages": [USER], "tools": 3}, "'tools' is no list"),
        ({"messages": [USER | {"from": "gpt"}]}, "message 1 has role and from, which differ"),
        ({"conversations": [USER | {"value": "three?"}]}, "message 1 has content and value, which differ"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "a tool call without"),
    ],
)
def test_rows_without_a_clear_meaning(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow, match=f"^here: .*{reason}"):
        prompt_of("here", row)
    with pytest.raises(UnusableRow, match="has no field 'other'; its fields are"):
        prompt_of("here", row, "other")


def test_the_answer_follows_what_is_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    earlier = {"role": "assistant", "content": "<think>deep</think>one"}
    last = {"role": "assistant", "content": "three", "reasoning_content": "hm"}
    asked = "<user>two?<|endoftext|>\n<assistant>one<|endoftext|>\n<user>two?<|endoftext|>\n<assistant>"
    template = ChatTemplate(tokenizer, {})
    whole = chat(USER, earlier, USER, last)
    assert template.prompt("here", whole) == asked == template.prompt("here", whole.without_answer())
    assert template.answer("here", whole, asked) == "<think>hm</think>three<|endoftext|>\n"
    call = chat(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]})
    answer = template.answer("here", call, template.prompt("here", call))
    assert answer == '<think></think>{"name": "look", "arguments": {"at": "sky"}}<|endoftext|>\n'
    quiet = ChatTemplate(tokenizer, {"enable_thinking": False})
    assert quiet.prompt("here", whole) == f"{asked}<think></think>"
    # This template would give the answer other thoughts than the prompt has.
    with pytest.raises(UnusableRow, match="changes the prompt once an answer follows"):
        quiet.answer("here", whole, quiet.prompt("here", whole))


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            THINKING.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '' }}"),
            None,
            r"message 1 \(system",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", None, r"message 1 \(system\)"),
        ("{{ raise_exception('no system here') }}", None, "the chat template refuses it: no system here"),
        ("{{ messages + 1 }}", None, "the chat template refuses it"),
        (THINKING, [USER, {"role": "user", "content": " "}], "the last message before the answer is empty"),
        (THINKING, [{"role": "assistant", "content": "x"}], "nothing but an answer"),
        (
            THINKING.replace("{{ c.function | tojson }}", ""),
            [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "blue"}],
            "leaves out the tool calls of message 2",
        ),
    ],
)
def test_templates_that_do_not_say_all_of_a_chat(
    template: str, messages: list[dict[str, Any]] | None, reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    messages = messages or [{"role": "system", "content": "be brief"}, USER]
    with pytest.raises(UnusableRow, match=f"^here: .*{reason}"):
        ChatTemplate(tokenizer, {}).prompt("here", chat(*messages))


def test_a_template_may_trim_and_quote(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim | tojson | replace('a', '4') }}{% endfor %}"
    text = ChatTemplate(tokenizer, {}).prompt("here", chat(USER | {"content": ' say "a"\n'}))
    assert text == r'"s4y \"4\""'


def test_a_developer_is_the_system_of_templates_that_know_none(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = chat({"role": "developer", "content": "be brief"}, USER)
    assert ChatTemplate(tokenizer, {}).prompt("here", asked).startswith("<system>be brief")
    tokenizer.chat_template = THINKING + "{# developer #}"
    assert ChatTemplate(tokenizer, {}).prompt("here", asked).startswith("<developer>be brief")


def test_tools_need_a_place(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = chat(USER, tools=[{"type": "function", "function": {"name": "look"}}])
    with pytest.raises(UnusableRow, match="no place for tools"):
        ChatTemplate(tokenizer, {}).prompt("here", asked)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + THINKING
    assert '"name": "look"' in ChatTemplate(tokenizer, {}).prompt("here", asked)


def test_a_beginning_of_text_is_there_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template writes it, and the tokenizer would add another."""
    from speedstack.eval.data.prompts import encode_text

    processor = TemplateProcessing(single="<|mask|> $A", special_tokens=[("<|mask|>", 2)])
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = "<|mask|>" + THINKING
    text = ChatTemplate(tokenizer, {}).prompt("here", chat(USER))
    assert tokenizer.encode(text).count(2) == 2 and encode_text(tokenizer, text).count(2) == 1

"""Prompts in rows of public data: text, token ids, or chats, which a model's chat template turns into text.

Chats are lists of messages with role and content, or ShareGPT's from and value. Content is text, parts whose texts are
joined as templates join them, or null beside tool calls and reasoning. Images and unknown roles make a row unusable.
The last answer is not part of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from speedstack.eval.data.rows import UnusableRow

# Fields that hold messages; tables of plain columns keep their JSON.
_MESSAGES = ("messages", "conversations", "conversation")
FIELDS = (*_MESSAGES, "prompt", "turns", "question", "problem", "text")
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "ipython", "function"), "tool"),
    "human": "user",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
# Fields of an assistant's message beside a null content.
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages with role (system, developer, user, assistant or tool) and text; `tools` as chat templates take them."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def answer(self) -> Message | None:
        """The last message if it is the assistant's."""
        return self.messages[-1] if self.messages[-1]["role"] == "assistant" else None

    def with_answer(self, answer: Message) -> Chat:
        return replace(self, messages=[*self.messages, answer])

    def without_answer(self) -> Chat:
        return self if self.answer is None else replace(self, messages=self.messages[:-1])


Prompt = str | list[int] | Chat


def prompt_of(where: str, row: dict[str, Any] | UnusableRow, field: str | None = None) -> Prompt:
    """A row's prompt: text, token ids, the first of several turns, or a chat with its answer.

    It is in `field`, or the first of FIELDS present. Raises UnusableRow, a ValueError, naming the row.
    """
    if isinstance(row, UnusableRow):
        raise row
    name = next((name for name in FIELDS if row.get(name) is not None), None) if field is None else field
    if name is None or name not in row:
        what = f"no field '{name}'" if name else f"none of the fields {', '.join(FIELDS)}"
        raise UnusableRow(where, f"has {what}; its fields are {', '.join(row) or 'none'}")
    value = row[name]
    items = _json_or_same(value) if name in _MESSAGES else value
    if isinstance(items, list) and items and all(isinstance(message, dict) for message in items):
        return Chat(messages_of(where, items), _tools(where, row.get("tools")))
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]  # later turns answer a model's text
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    if value is None or value == []:
        raise UnusableRow(where, f"'{name}' is {'null' if value is None else 'empty'}")
    if not isinstance(value, str):
        raise UnusableRow(where, f"'{name}' is neither text nor messages, turns or token ids")
    return checked_text(where, f"'{name}'", value)


def checked_text(where: str, what: str, text: str) -> str:
    """`text` if it is not empty and can be tokenized. Raises UnusableRow otherwise."""
    if not text.strip():
        raise UnusableRow(where, f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableRow(where, f"{what} has half of a surrogate pair") from None
    return text


def checked_ids(where: str, ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` if all are tokens of `tokenizer`. Raises UnusableRow otherwise."""
    outside = next((token for token in ids if not 0 <= token < len(tokenizer)), None)
    if outside is not None:
        raise UnusableRow(where, f"token id {outside} is none of the tokenizer's {len(tokenizer)}")
    return ids


def messages_of(where: str, items: Sequence[Message]) -> list[Message]:
    """Messages normalized to role and content, with their other fields. Raises UnusableRow."""
    return [_message(where, number, item) for number, item in enumerate(items, start=1)]


def _message(where: str, number: int, item: Message) -> Message:
    # Tables give every message the union of keys, with nulls.
    item = {key: value for key, value in item.items() if value is not None}
    role, content = _either(where, number, item, "role", "from"), _either(where, number, item, "content", "value")
    known = _known_role(role)
    if known is None:
        raise UnusableRow(where, "a message has no role" if role is None else f"a message has the role {role!r:.40}")
    beside = known == "assistant" and any(item.get(key) for key in _BESIDE_CONTENT)
    if content is None and not beside:
        raise UnusableRow(where, f"the content of message {number} ({known}) is null")
    text = "" if content is None else _joined(where, number, content)
    if text.strip():
        checked_text(where, f"message {number}", text)
    old_call = item.pop("function_call", None)
    calls = item.pop("tool_calls", None) or old_call
    return {"role": known, "content": text, **item} | ({"tool_calls": _calls(where, number, calls)} if calls else {})


def _either(where: str, number: int, item: Message, name: str, other: str) -> Any:
    """Pop a field that has two names. Raises UnusableRow if both are there and differ."""
    value, same = item.pop(name, None), item.pop(other, None)
    if value is None or same is None:
        return same if value is None else value
    if value != same and not (name == "role" and _known_role(value) == _known_role(same) is not None):
        raise UnusableRow(where, f"message {number} has {name} and {other}, which differ")
    return value


def _known_role(role: Any) -> str | None:
    return _ROLES.get(role.lower()) if isinstance(role, str) else None


def _joined(where: str, number: int, content: Any) -> str:
    """The text of a content, joined from its parts."""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise UnusableRow(where, f"the content of message {number} is neither text nor parts")
    texts = []
    for part in parts:
        text = part
        if isinstance(part, dict):
            kind = part.get("type") or ("text" if part.get("text") is not None else "unknown")
            text = part.get("text") if kind in _TEXT_PARTS else None
            if text is None:
                raise UnusableRow(where, f"message {number} has a part of type {kind!r:.40}, and only text is read")
        if not isinstance(text, str):
            raise UnusableRow(where, f"message {number} has a part that is no text")
        texts.append(text)
    return "".join(texts)


def _calls(where: str, number: int, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which templates serialize; APIs send JSON text."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow(where, f"message {number} has a tool call without the name of a function")
        arguments = _json_or_same(function.get("arguments"))
        function = {**function, "arguments": {} if arguments is None else arguments}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def _tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    tools = _json_or_same(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRow(where, "'tools' is no list of functions")
    return tools


def _json_or_same(value: Any) -> Any:
    """The object or list in a JSON string, as tables of one type keep it; else the value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict | list) else value

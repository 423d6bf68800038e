"""Chats as text, in the chat template of a model's tokenizer.

A template is its authors' program: it may refuse a chat, drop parts, or write beginning and answer unlike in serving. A
row that it does not render in full is unusable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from speedstack.eval.data.chats import Chat, Message
from speedstack.eval.data.rows import UnusableRow


def check_template_kwargs(tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for variables without a chat template, or that it does not read."""
    if not kwargs:
        return
    source = template_source(tokenizer)
    unread = [name for name in kwargs if not re.search(rf"\b{re.escape(name)}\b", source)]
    if unread:
        raise ValueError(
            f"chat_template_kwargs has '{unread[0]}', which the chat template of {tokenizer.name_or_path} never reads: "
            "correct or drop it"
        )


def template_source(tokenizer: Any) -> str:
    """The text of the chat template, or of several. Raises ValueError if there is none."""
    template = tokenizer.chat_template
    if not template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: put a chat_template.jinja beside it, or "
            "give prompts as text"
        )
    return template if isinstance(template, str) else "\n".join(template.values())


class ChatTemplate:
    """The chat template of `tokenizer` with variables `kwargs`; `num_rendered` counts rendered chats.

    Raises ValueError as `check_template_kwargs`; methods raise it without a template, and UnusableRow for a chat that
    the template refuses or does not render in full.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
        check_template_kwargs(tokenizer, kwargs)
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs)
        self.num_rendered = 0

    def check_used(self) -> None:
        """Raise ValueError if variables were given and no chat used them."""
        if self._kwargs and not self.num_rendered:
            raise ValueError("chat_template_kwargs are for chats, and no prompt is one: drop them, or use the template")

    def prompt(self, where: str, chat: Chat) -> str:
        """The text sent to a server: all messages before the last answer, and the answer's header."""
        asked = chat.without_answer()
        if not asked.messages:
            raise UnusableRow(where, "the chat has nothing but an answer")
        if not asked.messages[-1]["content"].strip():
            raise UnusableRow(where, "the last message before the answer is empty")
        text = self._render(where, asked, is_prompt=True)
        self._check_nothing_is_lost(where, asked, text)
        self.num_rendered += 1
        return text

    def answer(self, where: str, chat: Chat, prompt: str) -> str:
        """The last answer with the template's end, as it follows `prompt`, from `prompt()`."""
        whole = self._render(where, chat, is_prompt=False)
        if not whole.startswith(prompt):
            raise UnusableRow(where, "the chat template changes the prompt once an answer follows: give both as text")
        assert chat.answer is not None
        _check_calls(where, chat, len(chat.messages) - 1, whole)
        return whole[len(prompt) :]

    def _render(self, where: str, chat: Chat, is_prompt: bool) -> str:
        source = template_source(self._tokenizer)
        messages = list(chat.messages)
        if "developer" not in source:  # a newer name, which most templates ignore
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        if chat.tools and not re.search(r"\btools\b", source):
            raise UnusableRow(where, "the chat template has no place for tools")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=chat.tools, tokenize=False, add_generation_prompt=is_prompt, **self._kwargs
            )
        except Exception as error:  # a template may raise anything
            raise UnusableRow(where, f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from error
        assert isinstance(text, str)
        return text

    def _check_nothing_is_lost(self, where: str, chat: Chat, text: str) -> None:
        """Raise UnusableRow for lost text: templates silently drop unknown roles and misplaced messages."""
        for index, message in enumerate(chat.messages):
            content = message["content"].strip()
            if message["role"] == "assistant":  # templates drop its thinking on purpose
                _check_calls(where, chat, index, text)
            elif content and content not in text:
                changed = message | {"content": f"{message['content']} and more"}
                if self._render(where, _with(chat, index, changed), is_prompt=True) == text:
                    raise UnusableRow(where, f"the chat template leaves out message {index + 1} ({message['role']})")


def _check_calls(where: str, chat: Chat, index: int, text: str) -> None:
    calls: Sequence[Message] = chat.messages[index].get("tool_calls", ())
    if not all(call.get("function", call)["name"] in text for call in calls):
        raise UnusableRow(where, f"the chat template leaves out the tool calls of message {index + 1}")


def _with(chat: Chat, index: int, message: Message) -> Chat:
    return replace(chat, messages=[*chat.messages[:index], message, *chat.messages[index + 1 :]])

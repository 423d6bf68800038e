"""Settings of reading prompts and chats: field, chat template variables, tolerated unusable rows."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from tyro.constructors import PrimitiveConstructorSpec

# Arguments of transformers' `apply_chat_template` itself; template variables have other names.
_NOT_OF_THE_TEMPLATE = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def _parsed(value: Any) -> Any:
    """A flag's JSON object or a YAML file's mapping."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"expected a JSON object such as '{{\"enable_thinking\": false}}': {error}") from error


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(value.keys() & _NOT_OF_THE_TEMPLATE):
        raise ValueError(f"'{taken[0]}' is no variable of a chat template: leave it out")
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected what JSON has: {error}") from error
    return value


ChatTemplateKwargs = Annotated[
    dict[str, Any],
    BeforeValidator(_parsed),
    AfterValidator(_checked),
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        # The validator refuses what is not JSON.
        instance_from_str=lambda words: words[0],  # type: ignore[arg-type, return-value]
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


class PromptSettings(BaseModel):
    """What every reader of prompts and chats is told."""

    model_config = ConfigDict(frozen=True)

    field: str | None = Field(
        None,
        min_length=1,
        description="Field of the prompt: text, token ids, or a chat as a list of messages (role and content, or "
        "ShareGPT's from and value). None: the first that a row has of messages, conversations, conversation, prompt, "
        "turns, question, problem and text.",
    )
    chat_template_kwargs: ChatTemplateKwargs = Field(
        {}, description="Variables for the chat template, as a JSON object: '{\"enable_thinking\": false}'."
    )
    max_unusable_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Part of the rows looked at that may be unusable (broken, empty, with images or unknown roles, "
        "refused by the chat template); they are left out, and more of them end the job.",
    )

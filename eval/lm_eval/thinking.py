"""The thinking of a model before its answer: what ends it, and the answer after it.

As in lm-eval's adapters. Thinking contains strings that end an answer, such as empty lines: stop strings count only
after its end, as in the vLLM adapter; with transformers' adapter that depends on the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import postprocess_generated_text


def find_think_end(tokenizer: Any, token: str | int | None) -> str | int | None:
    """The end of thinking as a token id or text. Raises ValueError for a token that is neither.

    Digits are an id, as in lm-eval. A special token is found by id, because scored text does not contain it.
    """
    if token is None:
        return None
    if token == "":
        raise ValueError("the end of thinking is empty: give the text, or the id of the token, that ends it")
    if isinstance(token, str) and not token.isdigit():
        ids = {str(added): id for id, added in tokenizer.added_tokens_decoder.items() if added.special}
        return ids.get(token, token)
    if not 0 <= int(token) < len(tokenizer):
        raise ValueError(f"the end of thinking is token {token}, and the tokenizer has {len(tokenizer)} tokens")
    return int(token)


def check_thinking(kwargs: Mapping[str, Any], think_end: str | int | None, tasks: Sequence[Any]) -> None:
    """Check thinking turned on by `enable_thinking`, as lm-eval's adapters do.

    Raises ValueError for thinking without an end, and for tasks that generate nothing.
    """
    if kwargs.get("enable_thinking") is not True:
        return
    if think_end is None:
        raise ValueError("enable_thinking is true: say what ends the thinking with --think-end-token, such as </think>")
    if scored := sorted({task.task_name for task in tasks if task.OUTPUT_TYPE != "generate_until"}):
        raise ValueError(
            f"enable_thinking is true, and tasks have no text to think in: {', '.join(scored[:4])}"
            f"{', ...' if scored[4:] else ''}: leave them out, or turn thinking off"
        )


def strip_thinking(tokenizer: Any, tokens: Sequence[int], text: str, think_end: str | int) -> tuple[str, bool]:
    """Text after the last end of thinking, without the space before it, and whether there was an end.

    `text` is that of `tokens`. Without an end all of it stays, as in lm-eval.
    """
    if isinstance(think_end, str):
        return postprocess_generated_text(text, None, think_end), think_end in text
    if think_end not in tokens:
        return text.lstrip(), False
    last = len(tokens) - 1 - list(tokens)[::-1].index(think_end)
    return tokenizer.decode(tokens[last + 1 :], skip_special_tokens=True).lstrip(), True

"""The thinking of a model before its answer: what ends it, and the answer that is left.

As in lm-eval's adapters for transformers and vLLM, which differ in one thing. Thinking is full of what ends an answer,
empty lines for one; vLLM's adapter heeds stop strings behind the end of thinking alone, and so it is here, where with
transformers' it depends on what else is in the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import postprocess_generated_text


def find_think_end(tokenizer: Any, token: str | int | None) -> str | int | None:
    """The end of thinking as it is looked for: the id of a token, or text. Raises ValueError for what is neither.

    Digits are an id, as to lm-eval. A special token is in no text that is scored, and is found by its id.
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
    """What lm-eval's adapters ask of thinking that is turned on, by `enable_thinking` in the template's variables.

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
    """What follows the last end of thinking, without the space before it, and whether there was one.

    `text` is that of the generated `tokens`. Without an end all of it is left, as in lm-eval.
    """
    if isinstance(think_end, str):
        return postprocess_generated_text(text, None, think_end), think_end in text
    if think_end not in tokens:
        return text.lstrip(), False
    last = len(tokens) - 1 - list(tokens)[::-1].index(think_end)
    return tokenizer.decode(tokens[last + 1 :], skip_special_tokens=True).lstrip(), True

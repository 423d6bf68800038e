"""Held-out text of a prepared corpus, in the form that `eval` measures on."""

from __future__ import annotations

from speedstack.eval.data.task_data import make_prompt_sets
from speedstack.train.data.corpus import Corpus


def heldout_texts(corpus: Corpus) -> dict[str, str]:
    """Name -> text of every held-out document."""
    return dict(zip(corpus.heldout["name"], corpus.heldout["text"], strict=True))


def heldout_prompts(corpus: Corpus, num_prompts: int, num_tokens: int, seed: int) -> dict[str, list[list[int]]]:
    """Set name -> `num_prompts` prompts of at most `num_tokens` ids. Raises ValueError as `make_prompt_sets` does."""

    def encode(text: str) -> list[int]:
        return corpus.tokenizer.encode(text, add_special_tokens=False)

    prefix_id = corpus.tokenizer.eos_token_id
    return make_prompt_sets(heldout_texts(corpus), encode, num_prompts, num_tokens, prefix_id, seed=seed)

"""Functions that our code tasks' YAML names: from a model's text to a program with its tests, and its score."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from speedstack.eval.lm_eval.pass_at_k import score_programs

# The examples that MBPP's authors put before every problem.
MBPP_EXAMPLES = (2, 3, 4)


def humaneval_programs(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Prompt, completion, tests, and the call that runs them."""
    return [
        [f"{doc['prompt']}{text}\n{doc['test']}\ncheck({doc['entry_point']})\n" for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def mbpp_examples(docs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The prompt's solved problems, from the data set's prompt split."""
    return [dict(doc) for doc in docs if doc["task_id"] in MBPP_EXAMPLES]


def mbpp_programs(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The text, and the tests."""
    return [
        ["\n".join((text, doc.get("test_setup_code", ""), *doc["test_list"], "")) for text in texts]
        for texts, doc in zip(resps, docs, strict=True)
    ]


def score(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@k of one problem's programs."""
    return score_programs(results[0])

"""Results of one suite side by side: differences from the first, whether they could be chance, and recovery.

All results answer the same documents, so tests are paired, which resolves differences far smaller than two separate
standard errors do. Right-or-wrong scores get McNemar's exact test, others a bootstrap over documents. There is no
correction for multiple tasks: at a significance of 0.05 one task in twenty differs by chance.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from speedstack.eval.results.environment import command_line
from speedstack.eval.results.suite import ComparedMetric, Comparison, Difference, HeadlineMetric, SuiteResult, TestName

# Resamples drawn at once; bounds memory for tasks of ten thousand documents.
RESAMPLES_AT_ONCE = 128
# Metrics for which lm-eval keeps a pair per document: (log-likelihood in nats, words or bytes).
RATIO_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "word_perplexity": lambda nats: np.exp(nats),
    "byte_perplexity": lambda nats: np.exp(nats),
    "bits_per_byte": lambda nats: nats / math.log(2),
}


def compare_results(
    results: Mapping[str, SuiteResult], significance: float = 0.05, num_resamples: int = 10000, seed: int = 0
) -> Comparison:
    """Compare each result, by label, with the first, on their common tasks.

    Raises ValueError for fewer than two results, another suite, no common task, other settings of a task (examples,
    generation, chat template), and other documents.
    """
    labels = list(results)
    if len(labels) < 2:
        raise ValueError("a comparison needs two different results or more")
    first = results[labels[0]]
    tasks = [{entry.task for entry in result.block.headline} for result in results.values()]
    shared = set.intersection(*tasks)
    for label in labels[1:]:
        _check_same_questions(labels[0], first, label, results[label], shared)
    metrics = []
    for headline in first.block.headline:
        if headline.task not in shared:
            continue
        metric = headline.metric or _first_metric(first, headline.task)
        value = _value(labels[0], first, headline.task, metric)
        table = _column(first, headline.task, metric)
        others = []
        for label in labels[1:]:
            other_value = _value(label, results[label], headline.task, metric)
            other_table = _column(results[label], headline.task, metric)
            test, stderr, p = _paired_test(metric, table, other_table, value, other_value, num_resamples, seed)
            better = _higher_is_better(first, headline.task, metric)
            others.append(
                Difference(
                    result=label,
                    value=other_value,
                    delta=other_value - value,
                    stderr=stderr,
                    p_value=p,
                    is_noise=None if p is None else p > significance,
                    recovery=_recovery(value, other_value, better),
                )
            )
        metrics.append(
            ComparedMetric(
                task=headline.task,
                metric=metric,
                num_documents=len(table),
                higher_is_better=_higher_is_better(first, headline.task, metric),
                test=test,
                baseline=value,
                baseline_stderr=first.stderr(headline.task, metric),
                others=tuple(others),
            )
        )
    recoveries = {
        label: [recovery for entry in metrics if (recovery := entry.others[i].recovery) is not None]
        for i, label in enumerate(labels[1:])
    }
    return Comparison(
        suite=first.block.suite,
        baseline=labels[0],
        significance=significance,
        metrics=tuple(metrics),
        left_out=tuple(sorted(set.union(*tasks) - shared)),
        mean_recovery={label: float(np.mean(values)) for label, values in recoveries.items() if values},
        target_sha256={label: result.block.target_sha256 for label, result in results.items()},
        environment=first.block.environment.model_copy(update={"command": command_line()}),
    )


def mcnemar(num_lost: int, num_won: int) -> float:
    """Two-sided exact p-value of `num_lost` documents turned wrong and `num_won` turned right (McNemar 1947).

    Under the null hypothesis each of them is a fair coin.
    """
    num_different = num_lost + num_won
    fewer = min(num_lost, num_won)
    tail = sum(math.comb(num_different, i) for i in range(fewer + 1))
    # Integers of any size divide exactly before conversion to float.
    return min(1.0, 2 * tail / 2**num_different)


def paired_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], a_DC: np.ndarray, b_DC: np.ndarray, num_resamples: int, seed: int
) -> tuple[float, float]:
    """(standard error, two-sided p-value) of statistic(b) - statistic(a), over resampled documents.

    Both are [documents, columns] of the same documents. `statistic` maps means over documents, [resamples, columns], to
    [resamples]. The p-value is twice the share of resamples with a difference across zero, at least 2 / (resamples +
    1).
    """
    rng = np.random.default_rng(seed)
    num_documents = len(a_DC)
    differences = []
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        size = (min(RESAMPLES_AT_ONCE, num_resamples - start), num_documents)
        index_RD = rng.integers(num_documents, size=size)
        differences.append(statistic(b_DC[index_RD].mean(axis=1)) - statistic(a_DC[index_RD].mean(axis=1)))
    difference_R = np.concatenate(differences)
    num_beyond = min(int((difference_R <= 0).sum()), int((difference_R >= 0).sum()))
    return float(difference_R.std(ddof=1)), min(1.0, 2 * (num_beyond + 1) / (num_resamples + 1))


def _paired_test(
    metric: str,
    a_DC: np.ndarray,
    b_DC: np.ndarray,
    a_value: float,
    b_value: float,
    num_resamples: int,
    seed: int,
) -> tuple[TestName | None, float | None, float | None]:
    """(test, standard error of the difference, p-value); Nones if documents do not make up the score."""
    statistic = _statistic(metric, a_DC.shape[1])
    if statistic is None or len(a_DC) < 2:
        return None, None, None
    for table_DC, value in ((a_DC, a_value), (b_DC, b_value)):
        if not math.isclose(float(statistic(table_DC.mean(axis=0)[None])[0]), value, rel_tol=1e-6, abs_tol=1e-9):
            return None, None, None
    if a_DC.shape[1] == 1 and np.isin(a_DC, (0, 1)).all() and np.isin(b_DC, (0, 1)).all():
        difference_D = (b_DC - a_DC)[:, 0]
        stderr = float(difference_D.std(ddof=1) / math.sqrt(len(difference_D)))
        return "McNemar", stderr, mcnemar(int((difference_D < 0).sum()), int((difference_D > 0).sum()))
    return "paired bootstrap", *paired_bootstrap(statistic, a_DC, b_DC, num_resamples, seed)


def _statistic(metric: str, num_columns: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """Function from the documents' means, [resamples, columns], to a score, [resamples]; None without one."""
    if num_columns == 1:
        return lambda means_RC: means_RC[:, 0]
    unit = RATIO_METRICS.get(metric.partition(",")[0])
    if unit is None or num_columns != 2:
        return None
    return lambda means_RC: unit(-means_RC[:, 0] / means_RC[:, 1])


def _check_same_questions(a_label: str, a: SuiteResult, b_label: str, b: SuiteResult, tasks: Collection[str]) -> None:
    if a.block.suite != b.block.suite:
        raise ValueError(
            f"{a_label} is of suite {a.block.suite}, {b_label} of suite {b.block.suite}: compare like suites"
        )
    if not tasks:
        raise ValueError(f"there is no task that {a_label}, {b_label} and all others have")
    asked = [[entry for entry in result.block.headline if entry.task in tasks] for result in (a, b)]
    leaves = list(dict.fromkeys(leaf for entry in asked[0] for leaf in _members(a, entry.task)))
    ways = [_asked(a, asked[0], leaves), _asked(b, asked[1], leaves)]
    if different := [name for name, value in ways[0].items() if value != ways[1][name]]:
        raise ValueError(
            f"{a_label} and {b_label} were asked differently ({', '.join(different)}): evaluate both with the same "
            "settings"
        )
    for task in leaves:
        documents, theirs = a.block.documents[task], b.block.documents.get(task)
        if theirs is None or theirs.doc_hashes != documents.doc_hashes:
            num_theirs = 0 if theirs is None else len(theirs.doc_hashes)
            raise ValueError(
                f"{a_label} and {b_label} answered different documents of {task} ({len(documents.doc_hashes)} and "
                f"{num_theirs}): evaluate both with the same --limit and data"
            )


def _asked(result: SuiteResult, headline: Sequence[HeadlineMetric], leaves: Sequence[str]) -> dict[str, Any]:
    """Settings, by name, that change the question asked of the same documents."""
    block, configs = result.block, result.lm_eval.get("configs", {})
    return {
        "metric or number of examples": headline,
        "chat template": block.chat_template,
        "chat template's variables": block.chat_template_kwargs,
        "end of thinking": block.think_end_token,
        "length of texts": block.max_gen_toks,
        "own tasks": block.include_path_sha256 if set(leaves) & set(block.own_tasks) else None,
        "version of a task": {leaf: result.lm_eval.get("versions", {}).get(leaf) for leaf in leaves},
        "generation settings": {
            leaf: [configs.get(leaf, {}).get(name) for name in ("generation_kwargs", "repeats")] for leaf in leaves
        },
    }


def _value(label: str, result: SuiteResult, task: str, metric: str) -> float:
    value = result.value(task, metric)
    if value is None or not math.isfinite(value):
        what = f"has no metric {metric!r} of {task}" if value is None else f"has {value} for {metric!r} of {task}"
        raise ValueError(f"{label} {what}")
    return value


def _members(result: SuiteResult, task: str) -> list[str]:
    """The tasks whose documents make up `task`: itself, or its group's."""
    if task in result.block.documents:
        return [task]
    members = result.lm_eval.get("group_subtasks", {}).get(task, [])
    return [leaf for member in members for leaf in _members(result, member)]


def _column(result: SuiteResult, task: str, metric: str) -> np.ndarray:
    """Every document's score, [documents, columns], NaN if missing; empty if a member lacks the metric."""
    scores = [one for member in _members(result, task) for one in result.block.documents[member].scores.get(metric, ())]
    rows = [score if isinstance(score, tuple) else (score,) for score in scores]
    width = max(map(len, rows), default=1)
    return np.array([row if row[0] is not None else (math.nan,) * width for row in rows], np.float64).reshape(-1, width)


def _higher_is_better(result: SuiteResult, task: str, metric: str) -> bool | None:
    name = metric.partition(",")[0]
    found = [result.block.documents[member].higher_is_better.get(name) for member in _members(result, task)]
    return found[0] if found else None


def _first_metric(result: SuiteResult, task: str) -> str:
    members = _members(result, task)
    return next(iter(result.block.documents[members[0]].scores), "") if members else ""


def _recovery(baseline: float, value: float, higher_is_better: bool | None) -> float | None:
    if higher_is_better is None or baseline <= 0 or value < 0 or (value == 0 and not higher_is_better):
        return None
    return value / baseline if higher_is_better else baseline / value

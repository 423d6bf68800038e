"""Comparisons against scipy, and against differences that were put in."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from speedstack.eval.lm_eval.compare import compare_results, mcnemar, paired_bootstrap
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.suite import HeadlineMetric, SuiteBlock, SuiteResult, TaskDocuments


def result(columns: dict[str, list], suite: str = "made up", **block: Any) -> SuiteResult:
    """A result with one task a column; its values are what lm-eval would make of the documents."""
    tasks, documents, headline = {}, {}, []
    for name, scores in columns.items():
        task, _, metric = name.partition(":")
        table = np.array(scores, dtype=float).reshape(len(scores), -1)
        means = table.mean(axis=0)
        value = means[0] if len(means) == 1 else -means[0] / means[1] / math.log(2)
        tasks[task] = {f"{metric},none": float(value), f"{metric}_stderr,none": "N/A"}
        better = {} if metric == "unknown" else {metric: len(means) == 1}
        documents[task] = TaskDocuments(
            doc_hashes=tuple(str(i) for i in range(len(scores))),
            scores={f"{metric},none": tuple(scores)},
            higher_is_better=better,
        )
        headline.append(HeadlineMetric(task=task, metric=f"{metric},none", num_fewshot=None))
    fields: dict[str, Any] = {
        "suite": suite,
        "headline": tuple(headline),
        "target": "model",
        "target_sha256": "0",
        "drafter": None,
        "drafter_sha256": None,
        "quantization": None,
        "dtype": "float32",
        "backend": "reference",
        "device": "cpu",
        "max_length": 256,
        "batch_size": 8,
        "num_processes": 1,
        "limit": None,
        "chat_template": False,
        "seeds": {"sampling": 0},
        "code_isolation": None,
        "seconds": 1.0,
        "requests": {},
        "documents": documents,
        "environment": describe_environment(),
    }
    return SuiteResult({"results": tasks, "group_subtasks": {}}, SuiteBlock(**(fields | block)))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 9), (9, 3), (10, 10), (120, 80), (2000, 2200)])
def test_mcnemar_is_scipys_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_agrees_with_the_t_test_where_both_apply() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(400, 1))
    for shift in (0.0, 0.02, 0.1):
        b = a + rng.normal(shift, 0.3, size=a.shape)
        stderr, p = paired_bootstrap(lambda means: means[:, 0], a, b, 10000, seed=0)
        assert stderr == pytest.approx((b - a).std(ddof=1) / math.sqrt(len(a)), rel=0.05)
        # Of ten thousand resamples a share of 0.05 has a standard error of 0.002, twice that for two sides.
        assert p == pytest.approx(stats.ttest_rel(a[:, 0], b[:, 0]).pvalue, abs=0.03)


def test_bootstrap_keeps_its_promise_where_nothing_differs() -> None:
    rng = np.random.default_rng(2)
    p_values = []
    for seed in range(200):
        a, b = rng.exponential(size=(2, 60, 1))
        p_values.append(paired_bootstrap(lambda means: means[:, 0], a, b, 400, seed)[1])
    # Ten of two hundred are expected below 0.05; twenty-two or more have a chance of one in two thousand.
    assert sum(p < 0.05 for p in p_values) < 22


def test_accuracy_is_tested_by_mcnemar() -> None:
    right = [1.0] * 60 + [0.0] * 40
    worse = [1.0] * 45 + [0.0] * 55
    (entry,) = compare_results({"a": result({"t:acc": right}), "b": result({"t:acc": worse})}).metrics
    (other,) = entry.others
    assert entry.test == "McNemar" and entry.baseline == 0.6 and entry.num_documents == 100
    assert other.delta == pytest.approx(-0.15) and other.p_value == mcnemar(15, 0) and other.is_noise is False
    assert other.recovery == pytest.approx(0.75)
    assert other.stderr == pytest.approx(np.std([-1.0] * 15 + [0.0] * 85, ddof=1) / 10)
    # Two flips of a hundred are chance.
    (entry,) = compare_results({"a": result({"t:acc": right}), "b": result({"t:acc": [0.0, 0.0, *right[2:]]})}).metrics
    assert entry.others[0].p_value == 0.5 and entry.others[0].is_noise


def test_perplexity_is_a_ratio_of_sums_over_documents() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(50, 500, size=40)
    nats = rng.normal(1.0, 0.2, size=40) * sizes
    worse = nats * 1.01
    a = result({"p:bits_per_byte": [(-float(n), float(s)) for n, s in zip(nats, sizes, strict=True)]})
    b = result({"p:bits_per_byte": [(-float(n), float(s)) for n, s in zip(worse, sizes, strict=True)]})
    (entry,) = compare_results({"a": a, "b": b}).metrics
    (other,) = entry.others
    assert entry.test == "paired bootstrap" and entry.higher_is_better is False
    assert other.delta == pytest.approx(0.01 * entry.baseline)
    assert other.is_noise is False and other.recovery == pytest.approx(1 / 1.01)
    # The other one's documents in another order are other documents, not a shift of all.
    shuffled = rng.permutation(40)
    c = result({"p:bits_per_byte": [(-float(nats[i]), float(sizes[i])) for i in shuffled]})
    (entry,) = compare_results({"a": a, "c": c}).metrics
    assert entry.others[0].is_noise and entry.others[0].delta == pytest.approx(0, abs=1e-12)


def test_scores_that_documents_do_not_make_up_get_no_test() -> None:
    odd = result({"t:f1": [0.0, 1.0, 1.0]})
    odd.lm_eval["results"]["t"]["f1,none"] = 0.8
    (entry,) = compare_results({"a": odd, "b": odd}).metrics
    assert entry.test is None and entry.others[0].is_noise is None and entry.others[0].recovery == 1.0


def test_groups_pool_the_documents_of_their_members() -> None:
    def grouped(scores: list[float]) -> SuiteResult:
        made = result({"one:acc": scores[:2], "two:acc": scores[2:]})
        made.lm_eval["results"]["both"] = {"acc,none": sum(scores) / len(scores)}
        made.lm_eval["group_subtasks"] = {"both": ["one", "two"]}
        block = made.block.model_copy(
            update={"headline": (HeadlineMetric(task="both", metric="acc,none", num_fewshot=5),)}
        )
        return SuiteResult(made.lm_eval, block)

    (entry,) = compare_results({"a": grouped([1, 0, 1, 1, 0]), "b": grouped([1, 1, 1, 1, 1])}).metrics
    assert (entry.num_documents, entry.test, entry.baseline) == (5, "McNemar", 0.6)


def test_documents_without_a_number_get_no_test() -> None:
    odd = result({"t:acc": [1.0, 0.0, 1.0], "p:bits_per_byte": [(-3.0, 4.0), (-5.0, 4.0), (-4.0, 5.0)]})
    block = odd.block.model_copy(
        update={
            "documents": {
                task: TaskDocuments.model_validate(
                    documents.model_dump()
                    | {"scores": {m: (*scores[:-1], None) for m, scores in documents.scores.items()}}
                )
                for task, documents in odd.block.documents.items()
            }
        }
    )
    holed = SuiteResult(odd.lm_eval, block)
    for entry in compare_results({"a": holed, "b": holed}).metrics:
        assert (entry.num_documents, entry.test) == (3, None)


@pytest.mark.parametrize(
    ("block", "lm_eval", "named"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {}, "chat template's variables"),
        ({"think_end_token": "</think>"}, {}, "end of thinking"),
        ({"max_gen_toks": 512}, {}, "length of texts"),
        ({"include_path_sha256": "1", "own_tasks": ("t",)}, {}, "own tasks"),
        ({}, {"versions": {"t": 2.0}}, "version of a task"),
        ({}, {"configs": {"t": {"generation_kwargs": {"temperature": 0.5}}}}, "generation settings"),
        ({}, {"configs": {"t": {"repeats": 4}}}, "generation settings"),
    ],
)
def test_results_that_were_asked_otherwise_are_refused(
    block: dict[str, Any], lm_eval: dict[str, Any], named: str
) -> None:
    a, b = result({"t:acc": [1.0, 0.0]}), result({"t:acc": [1.0, 0.0]}, **block)
    b.lm_eval.update(lm_eval)
    with pytest.raises(ValueError, match=rf"a and b were asked differently \({named}\)"):
        compare_results({"a": a, "b": b})


def test_a_folder_of_tasks_matters_to_its_own_alone() -> None:
    a = result({"t:acc": [1.0, 0.0]})
    b = result({"t:acc": [1.0, 0.0]}, include_path_sha256="1", own_tasks=("u",))
    assert compare_results({"a": a, "b": b}).metrics


def test_what_does_not_compare_is_named() -> None:
    a = result({"t:acc": [1.0, 0.0]})
    with pytest.raises(ValueError, match="a is of suite made up, b of suite other"):
        compare_results({"a": a, "b": result({"t:acc": [1.0, 0.0]}, suite="other")})
    with pytest.raises(ValueError, match=r"different documents of t \(2 and 3\): evaluate both with the same --limit"):
        compare_results({"a": a, "b": result({"t:acc": [1.0, 0.0, 1.0]})})
    with pytest.raises(ValueError, match="were asked differently"):
        compare_results({"a": a, "b": result({"t:acc": [1.0, 0.0]}, chat_template=True)})
    with pytest.raises(ValueError, match="two different results"):
        compare_results({"a": a})
    broken = result({"t:acc": [1.0, 0.0]})
    broken.lm_eval["results"]["t"]["acc,none"] = math.nan
    with pytest.raises(ValueError, match="b has nan for 'acc,none' of t"):
        compare_results({"a": a, "b": broken})


def test_tasks_that_one_result_lacks_are_left_out_and_named() -> None:
    """As the one that needs a teacher, which the teacher's own result has not."""
    full = result({"t:acc": [1.0, 0.0, 1.0]})
    quantized = result({"t:acc": [1.0, 0.0, 0.0], "same:exact_match": [1.0, 1.0, 0.0]})
    for pair in ({"full": full, "q": quantized}, {"q": quantized, "full": full}):
        comparison = compare_results(pair)
        assert [entry.task for entry in comparison.metrics] == ["t"]
        assert comparison.left_out == ("same",)
        assert comparison.markdown().splitlines()[-1] == "Left out, because not all results have them: same"
    with pytest.raises(ValueError, match="there is no task that full, other and all others have"):
        compare_results({"full": full, "other": result({"u:acc": [1.0, 0.0, 1.0]})})


def test_table_says_what_is_noise(tmp_path: Path) -> None:
    base = [1.0] * 50 + [0.0] * 50
    comparison = compare_results(
        {
            "full": result({"t:acc": base, "u:acc": base}),
            "bad": result({"t:acc": [0.0] * 100, "u:acc": [0.0, *base[1:]]}),
        }
    )
    lines = comparison.markdown().splitlines()
    rows = [line for line in lines if line.startswith("| t ") or line.startswith("| u ")]
    assert "McNemar" in rows[0] and "0.00 %" in rows[0] and "within noise" in rows[1] and "98.00 %" in rows[1]
    assert lines[-1] == "Mean recovery of bad: 49.00 %"
    assert comparison.save_markdown(tmp_path / "t.md").read_text().splitlines() == lines
    assert type(comparison).load(comparison.save(tmp_path / "t.json")) == comparison


def test_result_files_are_checked(tmp_path: Path) -> None:
    path = result({"t:acc": [1.0, 0.0]}).save(tmp_path / "a.json")
    assert SuiteResult.load(path).block.suite == "made up"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"schema_version": 1', '"schema_version": 7'), encoding="utf-8")
    with pytest.raises(ValueError, match="has schema version 7, this release reads version 1: measure again"):
        SuiteResult.load(path)
    path.write_text('{"results": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="is no result of a suite: it has no part 'speedstack'"):
        SuiteResult.load(path)
    with pytest.raises(ValueError, match="no result file at"):
        SuiteResult.load(tmp_path / "none.json")

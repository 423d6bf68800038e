"""A folder of one's own tasks: found, measured by the metric that was asked for, and refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from speedstack.eval.lm_eval.compare import compare_results
from speedstack.eval.lm_eval.own_tasks import read_own_tasks
from speedstack.eval.lm_eval.suite import Suite, SuiteSettings, SuiteTask, load_suite, run_suite
from speedstack.eval.quality.measure import measure_quality
from speedstack.eval.results.quality import QualityResult
from speedstack.eval.results.suite import SuiteResult
from speedstack.runtime import Engine

NUM_DOCUMENTS = 5
BASE: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
FILTERS = [
    {"name": "first-word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
    {"name": "whole", "filter": [{"function": "take_first"}]},
]
TASKS: dict[str, dict[str, Any]] = {
    "echo": {
        "output_type": "generate_until",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "num_beams": 1, "repetition_penalty": 1.0},
        "filter_list": FILTERS,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "tag": ["crafts"],
    },
    "pick": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["red", "blue"],
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "tag": ["crafts"],
    },
    "judged": {
        "output_type": "generate_until",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [
            {"metric": "neatness", "aggregation": "nanmean", "higher_is_better": True},
            {"metric": "variety", "aggregation": "!function judge.variety", "higher_is_better": True},
        ],
        "process_results": "!function judge.judge",
    },
    "pair": {"group": "pair", "task": ["pick"], "aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}]},
    "heap": {"group": "heap", "task": ["pick", "echo"]},
}
JUDGE = """
def judge(doc, results):
    return {"neatness": float("nan") if doc["label"] else 0.5, "length": float(len(results[0])), "variety": results[0]}

def variety(texts):
    return len(set(texts)) / len(texts)
"""


def write_tasks(directory: Path) -> Path:
    directory.mkdir()
    rows = [{"text": f"{i} is", "word": "it", "label": i % 2} for i in range(NUM_DOCUMENTS)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(directory / "rows.jsonl")}, "cache_dir": str(directory / "__pycache__")}
    for name, task in TASKS.items():
        content = task if "group" in task else BASE | {"task": name, "dataset_kwargs": data} | task
        # A function is a tag of YAML's, which JSON has not.
        (directory / f"{name}.yaml").write_text(re.sub(r'"(!function [\w.]+)"', r"\1", json.dumps(content)))
    (directory / "judge.py").write_text(JUDGE)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture(autouse=True)
def without_lm_evals_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing them takes some ten seconds."""

    def manager(include_path: list[str], include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("speedstack.eval.lm_eval.task_loading.TaskManager", manager)


class Asked(AssertionError):
    """The engine was asked, and it should not."""


@pytest.fixture
def silent(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is to be answered."""

    def step(*arguments: Any, **options: Any) -> Any:
        raise Asked

    monkeypatch.setattr(engine.backend, "step", step)


def run(
    engine: Engine,
    model: Path,
    folder: Path,
    *entries: tuple[str, str | None],
    drafter: Path | None = None,
    **more: Any,
) -> SuiteResult:
    suite = Suite(tasks=tuple(SuiteTask(task=task, metric=metric) for task, metric in entries))
    settings = SuiteSettings(include_path=folder, progress=False, **more)
    return run_suite(engine, model, drafter, "mine", suite, settings)


def test_own_tasks_groups_and_tags_are_scored(engine: Engine, tiny_model_dir: Path, folder: Path) -> None:
    result = run(engine, tiny_model_dir, folder, ("pair", "acc"), ("echo", "exact_match,whole"), ("judged", None))
    # The only filter may be left out.
    assert [(entry.task, entry.metric) for entry in result.block.headline] == [
        ("pair", "acc,none"),
        ("echo", "exact_match,whole"),
        ("judged", None),
    ]
    result.check_headline()
    ((task, metric, value),) = result.scores("pair", "acc,none")
    assert (task, metric) == ("pair", "acc,none") and value == result.value("pick", "acc,none")
    # Without a metric all of them, also one that only the task's own code knows of.
    assert {metric for _, metric, _ in result.scores("judged", None)} == {
        "neatness,none",
        "length,none",
        "variety,none",
    }
    # Documents without a number, or with text, have no score; the mean is lm-eval's business.
    judged = result.block.documents["judged"].scores
    assert judged["neatness,none"] == (0.5, None, 0.5, None, 0.5) and judged["variety,none"] == (None,) * 5
    assert result.value("judged", "neatness,none") == 0.5
    assert result.block.include_path == str(folder) and len(result.block.include_path_sha256 or "") == 64
    (entry, *_) = compare_results({"a": result, "b": result}).metrics
    assert (entry.task, entry.num_documents, entry.test) == ("pair", 5, "McNemar")

    tag = run(engine, tiny_model_dir, folder, ("crafts", None))
    assert [entry.task for entry in tag.block.headline] == ["echo", "pick"]
    heap = run(engine, tiny_model_dir, folder, ("heap", None))
    found = [(task, metric) for task, metric, _ in heap.scores("heap", None)]
    assert found == [
        ("pick", "acc,none"),
        ("pick", "acc_norm,none"),
        ("echo", "exact_match,first-word"),
        ("echo", "exact_match,whole"),
    ]


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        ("pick", "accuracy,none", "pick has no metric 'accuracy,none'; did you mean 'acc,none'"),
        ("pick", "acc_norm,strict", r"'acc_norm,strict'; did you mean 'acc_norm,none'\? It also has acc,none"),
        ("echo", "exact_match", "several of 'exact_match': say which, exact_match,first-word or exact_match,whole"),
        ("echo", "exact_match,none", "did you mean 'exact_match,first-word'"),
        ("echo", "f1", "echo has no metric 'f1'; did you mean 'exact_match,first-word'"),
        ("pair", "acc_norm,none", "pair has no metric 'acc_norm,none'; did you mean 'acc,none'"),
        ("heap", "acc", "heap has no metric 'acc', and no score of its own: name tasks of it"),
        ("crafts", "acc,none", "echo has no metric 'acc,none'"),
        ("judged", "neatness,first", "judged has no metric 'neatness,first'; did you mean 'neatness,none'"),
    ],
)
def test_a_metric_that_is_not_reported_is_refused_before_anything_runs(
    engine: Engine, tiny_model_dir: Path, folder: Path, silent: None, task: str, metric: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(engine, tiny_model_dir, folder, (task, metric))


def test_what_only_a_tasks_code_knows_is_refused_in_the_end(
    engine: Engine, tiny_model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    result = run(engine, tiny_model_dir, folder, ("judged", "lenght"), ("echo", "exact_match,whole"), limit=2)
    assert result.value("echo", "exact_match,whole") is not None  # nothing is lost
    result = SuiteResult.load(result.save(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="judged has no metric 'lenght,none'; did you mean 'length,none'"):
        result.check_headline()


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"num_beams": 4}, "task echo: generation setting num_beams is 4, which the engine does not compute"),
        ({"max_gen_toks": 9000}, "task echo: max_gen_toks is 9000, but prompt and text share 256 tokens"),
        ({"do_sample": True, "min_p": 0.2}, r"task echo: generation setting min_p is 0\.2"),
    ],
)
def test_generation_settings_are_refused_before_anything_runs(
    engine: Engine, tiny_model_dir: Path, tmp_path: Path, silent: None, gen_kwargs: dict[str, Any], message: str
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    echo = json.loads((tasks / "echo.yaml").read_text())
    (tasks / "echo.yaml").write_text(json.dumps(echo | {"generation_kwargs": {"until": ["\n"]} | gen_kwargs}))
    # Log-likelihoods come first, and would take their hours.
    with pytest.raises(ValueError, match=message):
        run(engine, tiny_model_dir, tasks, ("pick", "acc"), ("echo", "exact_match,whole"))
    if "max_gen_toks" not in gen_kwargs:
        return
    with pytest.raises(Asked):  # one limit for all stands for the task's own
        run(engine, tiny_model_dir, tasks, ("echo", "exact_match,whole"), max_gen_toks=6, limit=1)


def test_a_share_of_the_documents_is_lm_evals(
    engine: Engine, tiny_model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    for limit, num_documents in ((0.5, 3), (2, 2), (0.01, 1)):
        result = run(engine, tiny_model_dir, folder, ("pick", "acc_norm"), limit=limit)
        assert len(result.block.documents["pick"].doc_hashes) == num_documents
        assert SuiteResult.load(result.save(tmp_path / "r.json")).block.limit == limit


def test_without_a_suite_they_are_scored_too(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("pick", "echo")
    result = measure_quality({"m": engine}, "m", [[1, 2, 3]], tmp_path, tasks, 0.4, progress=False, include_path=folder)
    assert (result.limit, result.include_path) == (0.4, str(folder)) and result.include_path_sha256 is not None
    scores = {(score.task, score.metric): score.num_documents for score in result.method("m").tasks}
    # Of one metric through two filters neither stands for the other.
    assert scores == {
        ("pick", "acc"): 2,
        ("pick", "acc_norm"): 2,
        ("echo", "exact_match,first-word"): 2,
        ("echo", "exact_match,whole"): 2,
    }
    assert QualityResult.load(result.save(tmp_path / "quality.json")) == result
    monkeypatch.setattr(engine.backend, "step", None)  # nothing is computed before a typing error is said
    with pytest.raises(ValueError, match="no task 'pcik'; near names: pick"):
        measure_quality({"m": engine}, "m", [[1, 2]], tmp_path, ("pcik",), progress=False, include_path=folder)


def test_one_limit_of_texts_stands_for_all(engine: Engine, tiny_model_dir: Path, folder: Path) -> None:
    result = run(engine, tiny_model_dir, folder, ("echo", None), ("judged", None), max_gen_toks=1, think_end_token="#")
    counts = [result.block.requests[task] for task in ("echo", "judged")]
    assert [one.num_new_tokens for one in counts] == [NUM_DOCUMENTS] * 2
    assert result.block.max_gen_toks == 1 and result.block.think_end_token == "#"
    assert counts[0].num_without_answer == NUM_DOCUMENTS


def test_answers_are_kept_by_what_decides_them(
    engine: Engine,
    drafting_engine: Engine,
    tiny_model_dir: Path,
    tiny_drafter_dir: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    cache = tmp_path / "answers"

    def num_cached(engine: Engine, folder: Path, drafter: Path | None = None, **more: Any) -> tuple[int, int]:
        result = run(
            engine, tiny_model_dir, folder, ("echo", None), ("pick", None), drafter=drafter, cache=cache, **more
        )
        return result.block.requests["echo"].num_cached, result.block.requests["pick"].num_cached

    assert num_cached(engine, folder) == (0, 0)
    assert num_cached(engine, folder) == (5, 10)
    # Log-likelihoods know no drafter; generations are kept with their rounds.
    assert num_cached(drafting_engine, folder, tiny_drafter_dir) == (0, 10)
    assert num_cached(drafting_engine, folder, tiny_drafter_dir) == (5, 10)
    assert num_cached(engine, folder) == (5, 10)
    assert num_cached(engine, folder, max_gen_toks=5)[0] == num_cached(engine, folder, think_end_token="#")[0] == 0
    # The same tasks with another helper.
    helper = folder / "judge.py"
    try:
        helper.write_text(JUDGE + "\n")
        assert num_cached(engine, folder) == (0, 0)
    finally:
        helper.write_text(JUDGE)
    assert num_cached(engine, folder) == (5, 10)


def test_folders_that_are_none_are_one_line(engine: Engine, tiny_model_dir: Path, tmp_path: Path, silent: None) -> None:
    with pytest.raises(ValueError, match=r"no folder of tasks at .*nowhere"):
        run(engine, tiny_model_dir, tmp_path / "nowhere", ("pick", "acc"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no task: lm-eval reads \.yaml files"):
        run(engine, tiny_model_dir, tmp_path / "empty", ("pick", "acc"))
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "sub").mkdir()
    (tasks / "sub" / "again.yaml").write_text(json.dumps(BASE | TASKS["pick"] | {"task": "pick"}))
    with pytest.raises(ValueError, match=r"tasks/pick\.yaml and .*sub/again\.yaml both define pick: rename one"):
        read_own_tasks(tasks)
    (tasks / "sub" / "again.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"again\.yaml is not YAML"):
        read_own_tasks(tasks)
    (tasks / "sub" / "again.yaml").write_text("task: humaneval")
    with pytest.raises(ValueError, match=r"task humaneval of .* has the name of one of ours: rename it"):
        run(engine, tiny_model_dir, tasks, ("pick", "acc"))
    (tasks / "sub" / "again.yaml").write_text("task: odd\ncolour: red\n")
    with pytest.raises(ValueError, match=r"task odd of .*tasks cannot be loaded \(TypeError: .*colour"):
        run(engine, tiny_model_dir, tasks, ("odd", "acc"))
    with pytest.raises(ValueError, match="no task 'pikc'; near names: pick"):
        run(engine, tiny_model_dir, tasks, ("pikc", "acc"))
    with pytest.raises(ValueError, match="heap and pick share task pick: drop one"):
        run(engine, tiny_model_dir, tasks, ("heap", None), ("pick", "acc"))


def test_a_task_is_in_a_suite_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("tasks: [{task: gsm8k, num_fewshot: 0}, {task: pick}, {task: gsm8k, num_fewshot: 5}]")
    with pytest.raises(ValueError, match=r"twice\.yaml: task gsm8k is listed twice, and a result has one score"):
        load_suite(str(path))

"""Suites on data of one's own: local files in the place of the Hub's, groups of tasks, programs that are run."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.eval.lm_eval.compare import compare_results
from speedstack.eval.lm_eval.suite import Suite, SuiteSettings, SuiteTask, run_suite
from speedstack.eval.lm_eval.task_loading import TASKS_DIR, TaskLoader
from speedstack.runtime import Engine

GSM8K = [
    {"question": f"Ann has {i} apples and buys 2. How many are there?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}
    for i in range(8)
]


@pytest.fixture
def gsm8k_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own gsm8k and nothing else of it."""
    (package,) = lm_eval.tasks.__path__

    def manager(include_path: str, include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=[str(TASKS_DIR), f"{package}/gsm8k"], include_defaults=False)

    monkeypatch.setattr("speedstack.eval.lm_eval.task_loading.TaskManager", manager)


def test_tasks_of_lm_eval_take_local_files(
    engine: Engine, tiny_model_dir: Path, gsm8k_only: None, tmp_path: Path
) -> None:
    place = tmp_path / "data" / "openai" / "gsm8k" / "main"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    suite = Suite(tasks=(SuiteTask(task="gsm8k", num_fewshot=1, metric="exact_match,strict-match"),))
    run = SuiteSettings(limit=1, data=tmp_path / "data", progress=False)
    # The task asks for 256 tokens, which this engine's sequences cannot hold.
    with pytest.raises(ValueError, match="max_gen_toks is 256, but prompt and text share 256 tokens: lower it"):
        run_suite(engine, tiny_model_dir, None, "mine", suite, run)
    (task,) = TaskLoader(["gsm8k"], data=tmp_path / "data").load("gsm8k")
    assert len(task.dataset["test"]) == len(GSM8K) and task.dataset["test"][3]["question"] == GSM8K[3]["question"]


def test_without_a_network_the_files_to_provide_are_named(gsm8k_only: None, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data set openai/gsm8k \(main\) could not be loaded from the Hub .*give --data DIR"
    ):
        TaskLoader(["gsm8k"]).load("gsm8k")
    with pytest.raises(ValueError, match=f"{tmp_path}/openai/gsm8k/main/test.jsonl"):
        TaskLoader(["gsm8k"], data=tmp_path).load("gsm8k")


GROUP = {
    "group": "pair",
    "task": ["pair_one", "pair_two"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}
MEMBER = {
    "dataset_path": "made/up",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "train",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["A", "B"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def test_groups_take_examples_data_and_a_score(
    engine: Engine, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "pair.yaml").write_text(json.dumps(GROUP))
    for name, size in (("one", 2), ("two", 3)):
        (tasks / f"{name}.yaml").write_text(json.dumps(MEMBER | {"task": f"pair_{name}", "dataset_name": name}))
        place = tmp_path / "data" / "made" / "up" / name
        place.mkdir(parents=True)
        rows = [{"question": f"{name} {i}?", "label": i % 2} for i in range(size)]
        for split in ("train", "test"):
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def manager(include_path: str, include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=str(tasks), include_defaults=False)

    monkeypatch.setattr("speedstack.eval.lm_eval.task_loading.TaskManager", manager)
    suite = Suite(tasks=(SuiteTask(task="pair", num_fewshot=1, metric="acc,none"),))
    result = run_suite(
        engine, tiny_model_dir, None, "mine", suite, SuiteSettings(data=tmp_path / "data", progress=False)
    )
    assert result.lm_eval["n-shot"] == {"pair": 1, "pair_one": 1, "pair_two": 1}
    assert {task: len(one.doc_hashes) for task, one in result.block.documents.items()} == {"pair_one": 2, "pair_two": 3}
    (entry,) = compare_results({"a": result, "b": result}).metrics
    assert (entry.task, entry.num_documents, entry.test) == ("pair", 5, "McNemar")
    assert entry.baseline == result.value("pair", "acc,none") and entry.others[0].p_value == 1.0


HUMANEVAL = [
    {
        "task_id": f"made/{i}",
        "prompt": f'def f{i}(x):\n    """x + {i}"""\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(f):\n    assert f(1) == {1 + i}\n",
        "entry_point": f"f{i}",
    }
    for i in range(2)
]
MBPP = [
    {
        "task_id": i,
        "text": f"Add {i}.",
        "code": f"def f(x): return x + {i}",
        "test_list": [f"assert f(1) == {1 + i}"] * 3,
    }
    for i in range(1, 7)
]


def code_data(directory: Path) -> Path:
    for place, splits in (
        ("openai/openai_humaneval/default", {"test": HUMANEVAL}),
        ("google-research-datasets/mbpp/full", {"test": MBPP[4:], "prompt": MBPP}),
    ):
        (directory / place).mkdir(parents=True)
        for split, rows in splits.items():
            (directory / place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_programs_are_drawn_run_and_counted(
    engine: Engine, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Instance] = []

    def write(self: EngineLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Right for the first problem of each set, and in every second draw of the second."""
        asked.extend(requests)
        texts = []
        for i, request in enumerate(requests):
            if request.doc.get("entry_point"):
                texts.append(request.doc["canonical_solution"] if request.doc_id == 0 or i % 2 else "    return None")
            else:
                texts.append(request.doc["code"] if request.doc_id == 0 else "def f(x): return 0")
        return texts

    monkeypatch.setattr(EngineLM, "generate_until", write)
    suite = Suite(
        tasks=(
            SuiteTask(task="humaneval", metric="pass@1,program", num_samples=2, temperature=0.8, top_p=0.95),
            SuiteTask(task="mbpp", num_fewshot=3, metric="pass@1,program"),
        )
    )
    run = SuiteSettings(data=code_data(tmp_path / "data"), allow_code=True, progress=False)
    result = run_suite(engine, tiny_model_dir, None, "code", suite, run)
    assert result.value("speedstack_humaneval", "pass@1,program") == 0.75
    assert result.value("speedstack_mbpp", "pass@1,program") == 0.5
    assert result.block.code_isolation is not None and "seccomp" in result.block.code_isolation
    humaneval = [request.args for request in asked if request.task_name == "speedstack_humaneval"]
    assert len(humaneval) == 4 and humaneval[0][0] == HUMANEVAL[0]["prompt"]
    assert humaneval[0][1]["temperature"] == 0.8 and humaneval[0][1]["do_sample"]
    (prompt, _), *_ = (request.args for request in asked if request.task_name == "speedstack_mbpp")
    # Problems 2, 3 and 4, solved; then the question.
    assert [prompt.count(f"Add {i}.") for i in range(1, 7)] == [0, 1, 1, 1, 1, 0]
    assert prompt.count("[DONE]") == 3 and prompt.endswith("[BEGIN]\n")

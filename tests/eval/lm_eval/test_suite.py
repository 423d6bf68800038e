"""Suites: what they list; that they run as lm-eval would, survive a kill, are shared by processes, and complain."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from speedstack.eval.data.task_data import TaskSizes, make_same_text, make_tasks
from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.eval.lm_eval.request_cache import RequestCache, drafting_key, model_key, request_key
from speedstack.eval.lm_eval.suite import (
    Suite,
    SuiteSettings,
    SuiteTask,
    cache_directory,
    load_suite,
    run_suite,
    suites_directory,
)
from speedstack.eval.lm_eval.task_loading import generation_settings
from speedstack.eval.quality.measure import run_tasks
from speedstack.eval.results.suite import SuiteResult
from speedstack.runtime import Engine
from speedstack.runtime.rounds.speculation import DraftStrategy

SIZES = TaskSizes(num_perplexity_documents=2, perplexity_chars=300, num_next_line=4, num_close_line=3)
OFFLINE = Suite(
    tasks=(
        SuiteTask(task="heldout_perplexity", metric="bits_per_byte,none"),
        SuiteTask(task="next_line", metric="acc_norm,none"),
        SuiteTask(task="close_line", metric="exact_match,strip"),
        SuiteTask(task="same_text", metric="exact_match,none"),
    )
)


@pytest.fixture(scope="module")
def task_data(documents: dict[str, str], engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    make_tasks(documents, path, sizes=SIZES)
    lm = EngineLM(engine, progress=False)
    assert (
        make_same_text(documents, lambda contexts: lm.write(contexts, generation_settings("same_text")), path, 3) == 3
    )
    return path


def settings(task_data: Path, cache: Path | None = None, **more: Any) -> SuiteSettings:
    return SuiteSettings(task_data=task_data, cache=cache, progress=False, **more)


@pytest.fixture(scope="module")
def result(engine: Engine, tiny_model_dir: Path, task_data: Path) -> SuiteResult:
    return run_suite(engine, tiny_model_dir, None, "offline", OFFLINE, settings(task_data))


def test_shipped_suites_list_what_they_are_reported_for() -> None:
    listed = {
        path.stem: [(entry.task, entry.num_fewshot) for entry in load_suite(path.stem)[1].tasks]
        for path in suites_directory().glob("*.yaml")
    }
    assert listed == {
        "recovery": [
            ("arc_challenge", 25),
            ("hellaswag", 10),
            ("mmlu", 5),
            ("winogrande", 5),
            ("truthfulqa_mc2", 0),
            ("gsm8k", 5),
        ],
        "code": [("humaneval", None), ("mbpp", 3)],
        "math": [("gsm8k", 5), ("minerva_math500", 4)],
        "wikitext": [("wikitext", None)],
        "offline": [("heldout_perplexity", None), ("next_line", None), ("close_line", None), ("same_text", None)],
    }
    assert all(entry.metric for path in listed for entry in load_suite(path)[1].tasks)


def test_suites_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no suite 'recover'; did you mean 'recovery'"):
        load_suite("recover")
    path = tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match="cannot read suite"):
        load_suite(str(path))
    path.write_text("tasks: [{task: gsm8k, num_shots: 5}]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tasks\.0\.num_shots: Extra inputs"):
        load_suite(str(path))
    path.write_text("tasks: [{task: gsm8k}]", encoding="utf-8")
    assert load_suite(str(path)) == ("mine", Suite(tasks=(SuiteTask(task="gsm8k"),)))


def test_result_is_lm_evals_with_a_block_of_ours(
    result: SuiteResult, engine: Engine, task_data: Path, tmp_path: Path
) -> None:
    theirs = run_tasks(engine, task_data, progress=False)
    for task, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if "stderr" not in metric:  # not asked for there
                assert result.lm_eval["results"][task][metric] == value
    assert {"configs", "versions", "n-shot", "n-samples", "config", "higher_is_better"} <= set(result.lm_eval)
    block = result.block
    assert (block.target_sha256, block.drafter_sha256) == (engine.target_sha256, None)
    assert (block.backend, block.dtype, block.quantization, block.num_processes) == ("reference", "float32", None, 1)
    assert block.seeds["sampling"] == 0 and block.seeds["random_seed"] == 0
    assert block.requests["speedstack_next_line"].num_requests == 4 * 4
    documents = block.documents["speedstack_next_line"]
    assert len(documents.doc_hashes) == 4 == len(set(documents.doc_hashes))
    scores = documents.scores["acc,none"]
    assert sum(map(float, scores)) / 4 == result.value("speedstack_next_line", "acc,none")  # type: ignore[arg-type]
    # The model writes what it wrote before.
    assert result.value("speedstack_same_text", "exact_match,none") == 1.0
    path = result.save(tmp_path / "offline.json")
    assert SuiteResult.load(path) == result
    assert set(json.loads(path.read_text())) == {*result.lm_eval, "speedstack"}


def test_packed_target_and_drafter_are_named(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, task_data: Path
) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, tiny_packed_drafter_dir, backend="reference", device="cpu")
    suite = Suite(tasks=(SuiteTask(task="close_line", metric="exact_match,strip"),))
    block = run_suite(engine, tiny_packed_dir, tiny_packed_drafter_dir, "mine", suite, settings(task_data)).block
    assert block.quantization == "mxfp4-pack-quantized"
    assert block.drafter_sha256 == engine.drafter_sha256 is not None
    counts = block.requests["speedstack_close_line"]
    assert counts.num_generations == 3 and counts.acceptance_length is not None and counts.acceptance_length >= 1


def test_a_killed_evaluation_asks_only_the_rest(
    engine: Engine, tiny_model_dir: Path, task_data: Path, result: SuiteResult, tmp_path: Path
) -> None:
    cache = cache_directory(tmp_path, engine, tiny_model_dir)
    suite = OFFLINE.without(("heldout_perplexity", "same_text"))

    def check_equal(again: SuiteResult) -> None:
        for task, documents in again.block.documents.items():
            assert documents == result.block.documents[task]
            assert again.lm_eval["results"][task] == result.lm_eval["results"][task]

    class Killed(BaseException):
        """What no handler expects."""

    class Dying(RequestCache):
        def put(self, key: str, answer: Any) -> None:
            super().put(key, answer)
            if len(self) == 5:
                raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("speedstack.eval.lm_eval.suite.RequestCache", Dying)
        run_suite(engine, tiny_model_dir, None, "mine", suite, settings(task_data, cache))
    (file,) = cache.iterdir()
    assert len(file.read_text().splitlines()) == 5
    with file.open("a") as torn:
        torn.write('["half a li')
    again = run_suite(engine, tiny_model_dir, None, "mine", suite, settings(task_data, cache))
    assert sum(counts.num_cached for counts in again.block.requests.values()) == 5
    check_equal(again)
    third = run_suite(engine, tiny_model_dir, None, "mine", suite, settings(task_data, cache))
    assert all(counts.num_cached == counts.num_requests for counts in third.block.requests.values())
    check_equal(third)


def test_cache_survives_torn_lines_and_keeps_models_apart(
    engine: Engine,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    RequestCache(tmp_path, rank=1).put("a", [1.5, True])
    with (tmp_path / "answers-1.jsonl").open("a") as file:
        file.write('["b", [2')
    with caplog.at_level(logging.WARNING):
        cache = RequestCache(tmp_path, rank=1)
    assert "1 unfinished lines are left out" in caplog.text
    assert "a" in cache and "b" not in cache
    cache.put("c", 0.1)
    reread = RequestCache(tmp_path)
    assert (reread["a"], reread["c"], len(reread)) == ([1.5, True], 0.1, 2)
    assert request_key("t", "score", ["x", "y"]) != request_key("t", "score", ["xy", ""])
    assert request_key("t", "score", ["x"]) != request_key("u", "score", ["x"])
    # Another config of the same weights is another model.
    copy = tmp_path / "copy"
    copy.mkdir()
    for source in tiny_model_dir.glob("*.json"):
        (copy / source.name).write_bytes(source.read_bytes())
    assert model_key(engine, copy) == model_key(engine, tiny_model_dir)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_value_scale": 1.0}))
    assert model_key(engine, copy) != model_key(engine, tiny_model_dir)
    # So is another tokenizer, whatever its file is called.
    for name in ("tokenizer.model.v3", "spiece.spm"):
        before = model_key(engine, copy)
        (copy / name).write_bytes(b"pieces")
        assert model_key(engine, copy) != before
    # So it is when other software answers.
    before = model_key(engine, copy)
    with monkeypatch.context() as patch:
        patch.setattr("speedstack.eval.lm_eval.request_cache.ANSWERS_VERSION", 0)
        assert model_key(engine, copy) != before
    monkeypatch.setattr("speedstack.eval.lm_eval.request_cache.version", lambda name: "0.0.1")
    assert model_key(engine, copy) != before


def test_acceptance_is_kept_by_drafter_and_strategy(
    engine: Engine, drafting_engine: Engine, tiny_model_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    look_up = Engine.from_pretrained(tiny_model_dir, "ngram", backend="reference", device="cpu")
    keys = [drafting_key(engine, None), drafting_key(look_up, Path("ngram"))]
    keys.append(drafting_key(drafting_engine, tiny_drafter_dir))
    # The same weights, which propose less.
    shorter = shutil.copytree(tiny_drafter_dir, tmp_path / "shorter")
    content = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(content | {"block_size": 4}))
    keys.append(drafting_key(drafting_engine, shorter))
    before = drafting_engine.strategy
    try:
        for strategy in (DraftStrategy(2), DraftStrategy(noise="shared"), DraftStrategy("adaptive")):
            drafting_engine.set_strategy(strategy)
            keys.append(drafting_key(drafting_engine, tiny_drafter_dir))
    finally:
        drafting_engine.set_strategy(before)
    assert len(set(keys)) == len(keys) == 7
    assert drafting_key(drafting_engine, tiny_drafter_dir) == keys[2]
    with pytest.raises(ValueError, match="acceptance is kept by drafter: say where it was loaded from"):
        drafting_key(drafting_engine, None)


SHARED = """
import sys
from pathlib import Path
from speedstack.eval.lm_eval.request_cache import RequestCache
from speedstack.eval.lm_eval.suite import SuiteSettings, load_suite, run_suite
from speedstack.eval.lm_eval.processes import join_processes
from speedstack.eval.lm_eval.worker import Worker
from speedstack.runtime import Engine

model, suite, task_data, cache, out = map(Path, sys.argv[1:])
with join_processes() as processes:
    engine = Engine.from_pretrained(model, backend="reference", device="cpu", max_batch_size=4)
    if processes.is_main:
        try:
            name, suite = load_suite(str(suite))
            settings = SuiteSettings(task_data=task_data, cache=cache, progress=False)
            run_suite(engine, model, None, name, suite, settings, processes).save(out)
        finally:
            processes.dismiss()
    else:
        processes.serve(Worker(engine, RequestCache(cache, processes.rank), progress=False))
"""


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    tiny_model_dir: Path, task_data: Path, result: SuiteResult, tmp_path: Path
) -> None:
    script, suite, out = tmp_path / "shared.py", tmp_path / "offline.yaml", tmp_path / "out.json"
    script.write_text(SHARED)
    suite.write_text(json.dumps(OFFLINE.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    arguments = [str(path) for path in (tiny_model_dir, suite, task_data, tmp_path / "cache", out)]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    shared = SuiteResult.load(out)
    assert shared.block.num_processes == 2
    assert shared.lm_eval["results"] == result.lm_eval["results"]
    assert shared.block.documents == result.block.documents
    # Both had a share, and each kept its own answers.
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.name for file in files] == ["answers-0.jsonl", "answers-1.jsonl"]
    assert all(len(file.read_text().splitlines()) >= 3 for file in files)


def test_unknown_tasks_and_code_are_refused_before_anything_runs(
    engine: Engine, tiny_model_dir: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_defaults(include_path: str, include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    # lm-eval takes some ten seconds to list its own tasks.
    monkeypatch.setattr("speedstack.eval.lm_eval.task_loading.TaskManager", without_defaults)

    def run(task: str, **more: Any) -> SuiteResult:
        suite = Suite(tasks=(SuiteTask(task=task, **more),))
        return run_suite(engine, tiny_model_dir, None, "mine", suite, settings(task_data))

    with pytest.raises(ValueError, match="no task 'human_eval'; near names: humaneval"):
        run("human_eval")
    with pytest.raises(ValueError, match="humaneval runs programs that the model wrote: allow it with --allow-code"):
        run("humaneval")
    with pytest.raises(ValueError, match="num_samples and temperature are for humaneval, mbpp, not for close_line"):
        run("close_line", num_samples=2, temperature=0.5)


def test_logits_that_are_no_numbers_end_the_suite_and_keep_what_was_answered(
    tiny_model_dir: Path, task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(tiny_model_dir, backend="reference", device="cpu", max_batch_size=1)
    original = engine.backend.step
    steps = 0

    def step(rows: Any, logit_rows: Any) -> Any:
        nonlocal steps
        steps += 1
        logits, best = original(rows, logit_rows)
        return logits, [-1] * len(best) if steps > 12 else best

    monkeypatch.setattr(engine.backend, "step", step)
    with pytest.raises(ValueError, match="are NaN; the checkpoint is broken"):
        run_suite(engine, tiny_model_dir, None, "offline", OFFLINE, settings(task_data, tmp_path))
    assert len(RequestCache(tmp_path)) > 0


def test_prompts_are_put_into_the_chat_template(
    engine: Engine, tiny_model_dir: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def write(self: EngineLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(EngineLM, "generate_until", write)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    suite = Suite(tasks=(SuiteTask(task="close_line", metric="exact_match,strip"),))
    result = run_suite(engine, tiny_model_dir, None, "mine", suite, settings(task_data, chat_template=True))
    contexts = [json.loads(line)["context"] for line in (task_data / "close_line.jsonl").read_text().splitlines()]
    assert asked == [f"<user>{context}<assistant>" for context in contexts]
    assert result.block.chat_template

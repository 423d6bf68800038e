"""Quality of models: known divergences, windows, and our three tasks run by lm-eval from their YAML."""

import json
import math
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager

from speedstack.eval.data.task_data import TaskSizes, make_tasks
from speedstack.eval.lm_eval.task_loading import TASK_NAMES
from speedstack.eval.quality.measure import heldout_windows, measure_quality, run_tasks, task_scores
from speedstack.eval.results.quality import QualityResult
from speedstack.runtime import Engine


@pytest.fixture(scope="module")
def task_dir(documents: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    sizes = TaskSizes(num_perplexity_documents=2, perplexity_chars=300, num_next_line=4, num_close_line=3)
    # The tiny tokenizer needs a token for every two characters; short contexts fit its 256 positions.
    make_tasks(documents, path, sizes=sizes)
    return path


class Shifted:
    """An engine whose logits are another's, with noise of a known seed added."""

    def __init__(self, engine: Engine, scale: float) -> None:
        self.engine = engine
        self.scale = scale

    def logits(self, ids: list[int]) -> torch.Tensor:
        logits_TV = self.engine.logits(ids)
        return logits_TV + self.scale * torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(0))


def test_quality_of_known_distance(engine: Engine, documents: dict[str, str]) -> None:
    ids = [engine.tokenizer.encode(text[:400]) for text in documents.values()]
    windows = heldout_windows(ids, window=32, max_tokens=150, prefix_id=0)
    engines = {"teacher": engine, "same": engine, "near": Shifted(engine, 0.1), "far": Shifted(engine, 1.0)}
    result = measure_quality(engines, "teacher", windows, progress=False)  # type: ignore[arg-type]
    teacher, same, near, far = (result.method(name) for name in ("teacher", "same", "near", "far"))
    assert teacher.kl_to_teacher_nats is None and teacher.top1_agreement is None
    assert same.kl_to_teacher_nats == 0.0 and same.top1_agreement == 1.0
    assert near.kl_to_teacher_nats and far.kl_to_teacher_nats and near.kl_stderr_nats
    # Noise of deviation s moves KL by about s^2 / 2 x (1 - sum p^2): 0.005 at most for 0.1.
    assert 1e-4 < near.kl_to_teacher_nats < 6e-3 < far.kl_to_teacher_nats
    assert near.top1_agreement is not None and far.top1_agreement is not None
    assert far.top1_agreement < near.top1_agreement
    # The loss is the one scoring gives, token by token.
    logprobs = torch.cat([engine.score(window).logprobs for window in windows])
    assert teacher.num_tokens == len(logprobs) == 150
    assert teacher.nll_nats == pytest.approx(-float(logprobs.double().mean()), abs=1e-5)
    assert teacher.perplexity == pytest.approx(math.exp(teacher.nll_nats))


def test_logits_that_are_no_numbers_name_their_model(engine: Engine) -> None:
    engines = {"teacher": engine, "broken": Shifted(engine, float("nan"))}
    with pytest.raises(ValueError, match=r"^the logits of broken are NaN; its checkpoint is broken"):
        measure_quality(engines, "teacher", [[1, 2, 3]], progress=False)  # type: ignore[arg-type]


def test_windows_take_turns_between_documents_and_stop_at_the_budget() -> None:
    windows = heldout_windows([list(range(100, 110)), [], [200, 201]], window=4, max_tokens=7, prefix_id=0)
    assert windows == [[0, 100, 101, 102], [0, 200, 201], [0, 103, 104]]
    assert heldout_windows([[5]], window=8, max_tokens=99, prefix_id=0) == [[0, 5]]
    with pytest.raises(ValueError, match="no held-out text"):
        heldout_windows([[]], window=8, max_tokens=99, prefix_id=0)
    with pytest.raises(ValueError, match="a window of 1 tokens predicts none"):
        heldout_windows([[1]], window=1, max_tokens=99, prefix_id=0)


def test_the_three_tasks_run_from_their_yaml(engine: Engine, task_dir: Path, tmp_path: Path) -> None:
    ids = engine.tokenizer.encode("def f(x):\n    return x\n")
    result = measure_quality({"model": engine}, "model", [ids], task_data=task_dir, progress=False)
    scores = {(score.task, score.metric): score for score in result.method("model").tasks}
    assert set(scores) == {
        ("heldout_perplexity", "word_perplexity"),
        ("heldout_perplexity", "byte_perplexity"),
        ("heldout_perplexity", "bits_per_byte"),
        ("next_line", "acc"),
        ("next_line", "acc_norm"),
        ("close_line", "exact_match"),
    }
    assert {score.num_documents for score in scores.values()} == {2, 4, 3}
    assert scores["next_line", "acc"].higher_is_better
    assert not scores["heldout_perplexity", "bits_per_byte"].higher_is_better
    # lm-eval's bits per byte against the definition, on the same documents.
    texts = [json.loads(line)["text"] for line in (task_dir / "heldout_perplexity.jsonl").read_text().splitlines()]
    nll = -sum(float(engine.score([0, *engine.tokenizer.encode(text)]).logprobs.sum()) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert scores["heldout_perplexity", "bits_per_byte"].value == pytest.approx(nll / num_bytes / math.log(2), rel=1e-5)
    # lm-eval's own numbers are kept beside ours, as JSON.
    assert QualityResult.load(result.save(tmp_path / "quality.json")) == result
    assert result.lm_eval["model"]["results"]["speedstack_next_line"]["acc,none"] == scores["next_line", "acc"].value


def test_exact_match_is_one_for_an_oracle(engine: Engine, task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [json.loads(line) for line in (task_dir / "close_line.jsonl").read_text().splitlines()]
    answers = {item["context"]: item["answer"] for item in items}

    def answer(self: object, requests: list, disable_tqdm: bool = False) -> list[str]:
        return [answers[request.args[0]] for request in requests]

    monkeypatch.setattr("speedstack.eval.lm_eval.adapter.EngineLM.generate_until", answer)
    (score,) = task_scores(run_tasks(engine, task_dir, ["close_line"], progress=False))
    assert (score.metric, score.value, score.stderr) == ("exact_match", 1.0, 0.0)


def test_limit_caps_the_documents(engine: Engine, task_dir: Path) -> None:
    scores = task_scores(run_tasks(engine, task_dir, ["next_line"], limit=2, progress=False))
    assert {score.num_documents for score in scores} == {2}


def test_bad_input_is_refused_by_name(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_defaults(include_path: str, include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    # lm-eval takes some ten seconds to list its own tasks, among which these names are not either.
    monkeypatch.setattr("speedstack.eval.lm_eval.task_loading.TaskManager", without_defaults)
    with pytest.raises(ValueError, match="teacher 'bf16' is not among the engines: mxfp4"):
        measure_quality({"mxfp4": engine}, "bf16", [[0, 1]])
    with pytest.raises(ValueError, match="no task 'next_lin'; near names: next_line"):
        run_tasks(engine, tmp_path, ["next_lin"])
    with pytest.raises(ValueError, match=f"no task 'zzzzzz'; ours are {', '.join(TASK_NAMES)}"):
        run_tasks(engine, tmp_path, ["next_line", "zzzzzz"])
    with pytest.raises(ValueError, match="no data of task next_line at"):
        run_tasks(engine, tmp_path, ["next_line"])

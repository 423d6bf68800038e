"""The engine and lm-eval's own adapter agree on the tiny model; no time is asserted."""

from pathlib import Path

import pytest

from speedstack.eval.data.task_data import TaskSizes, make_tasks
from speedstack.eval.microbench import lm

# Float32 products summed in another order.
LOGPROB_TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module")
def task_data(documents: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    make_tasks(documents, path, sizes=TaskSizes(2, 300, num_next_line=3, num_close_line=3))
    return path


def test_answers_agree_and_are_timed(
    tiny_packed_dir: Path,
    tiny_packed_drafter_dir: Path,
    task_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(lm, "EXPERTS_IMPLEMENTATIONS", dict.fromkeys(lm.KINDS.values(), ("grouped_mm",)))
    out = tmp_path / "lm.json"
    arguments = [str(tiny_packed_dir), "--drafter", str(tiny_packed_drafter_dir), "--task-data", str(task_data)]
    lm.main([*arguments, "--repeats", "1", "--max-length", "256", "--batch-size", "2", "--out", str(out)])
    result = lm.LmBench.load(out)
    assert [task.num_requests for task in result.tasks] == [12, 2, 3]
    for task in result.tasks:
        agreement = task.agreement
        assert agreement.num_equal == task.num_requests
        # A word's perplexity is the exponential of some thirty nats here.
        assert agreement.scores and all(a == pytest.approx(b, rel=1e-5) for a, b in agreement.scores.values())
        if task.kind == "loglikelihood":
            assert agreement.max_difference_nats is not None
            assert agreement.max_difference_nats < LOGPROB_TOLERANCE_NATS
        if task.kind == "generate_until":
            assert agreement.engine_error_nats is None and agreement.adapter_error_nats is None
        else:
            # Sums of float64 log-probabilities: the engine adds exactly, so that long texts are no worse than short.
            assert agreement.engine_error_nats is not None and agreement.adapter_error_nats is not None
            assert 0 < agreement.engine_error_nats < LOGPROB_TOLERANCE_NATS
            assert agreement.adapter_error_nats > 0
        if task.kind == "loglikelihood_rolling":
            # The adapter sums in float32.
            assert agreement.max_relative_difference is not None and agreement.max_relative_difference < 1e-6
        contestants = [timing.contestant for timing in task.timings]
        assert contestants == [
            lm.ENGINE,
            *([lm.ENGINE_DRAFTER] if task.kind == "generate_until" else []),
            lm.ADAPTER,
        ]
        assert task.timings[-1].speedup == 1.0
    assert "close_line: 3 requests (generate_until)" in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert lm.main([str(tmp_path / "none"), "--task-data", str(tmp_path)]) == 2
    assert "none" in capsys.readouterr().err.splitlines()[-1]

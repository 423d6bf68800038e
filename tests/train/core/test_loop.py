"""The loop's promises: exact resume after a kill, loud divergence, nothing lost on a full disk, refused mix-ups."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from speedstack.eval.results.metrics import read_metrics
from speedstack.support.config import dump_config
from speedstack.train.config.recipes import PretrainConfig
from speedstack.train.core.checkpoint import COMPLETE
from speedstack.train.core.loop import DivergedError, Recipe, RunResult, run
from speedstack.train.pretrain import pretrain

MakeConfig = Callable[..., PretrainConfig]
_TIMES = {"elapsed_seconds", "tokens_per_second"}
_JOB = """
import sys
from pathlib import Path
from speedstack.support.config import read_config
from speedstack.train.config.recipes import PretrainConfig
from speedstack.train.pretrain import pretrain
{before}
pretrain(read_config(PretrainConfig, Path(sys.argv[1])))
"""


def numbers(run_directory: Path) -> list[dict[str, Any]]:
    """The record without what a clock says."""
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in read_metrics(run_directory)]


def start(config: PretrainConfig, path: Path, before: str = "") -> subprocess.Popen[str]:
    path.write_text(dump_config(config))
    code = _JOB.format(before=before)
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE, text=True)


def assert_same_result(directory: Path, expected: Path) -> None:
    assert numbers(directory) == numbers(expected)
    weights, expected_weights = (load_file(path / "export" / "model.safetensors") for path in (directory, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_killed_twice_and_resumed_equals_uninterrupted(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    # Metrics averaged over 4 steps and checkpoints every 3: the averages have to survive the kill as well.
    changes: dict[str, Any] = {
        "loop__num_steps": 14, "loop__log_every": 4, "loop__save_every": 3, "loop__eval_every": 5,
        "run__precision": "bfloat16",
    }  # fmt: skip
    expected = pretrain(make_pretrain_config(tmp_path / "whole", **changes)).path
    config = make_pretrain_config(tmp_path / "killed", **changes)
    directory = config.run_directory
    # Slowed down, so that the kill falls in the middle: once while training, once while a checkpoint is written.
    slow_steps = (
        "import time, speedstack.train.core.loop as loop\n"
        "step = loop.train_step\n"
        "loop.train_step = lambda *arguments: (time.sleep(0.3), step(*arguments))[1]\n"
    )
    slow_files = (
        "import time, speedstack.train.core.trainer as trainer\n"
        "save = trainer.save_tensors\n"
        "trainer.save_tensors = lambda *arguments: (save(*arguments), time.sleep(30))\n"
    )
    for before, appears in [
        (slow_steps, directory / "checkpoints" / "step-6" / COMPLETE),
        (slow_files, directory / "checkpoints" / "step-9" / "model.safetensors"),
    ]:
        process = start(config, tmp_path / "job.yaml", before)
        deadline = time.monotonic() + 200
        while not appears.exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (directory / "export").exists()
    assert not (directory / "checkpoints" / "step-9" / COMPLETE).exists()
    with pytest.warns(UserWarning, match="step-9 is incomplete"):
        pretrain(config)
    assert_same_result(directory, expected)


def test_resume_at_the_last_step_trains_nothing(
    pretrained: RunResult, make_pretrain_config: MakeConfig, tmp_path: Path
) -> None:
    shutil.copytree(pretrained.path, tmp_path / "job")
    shutil.rmtree(tmp_path / "job" / "export")
    steps: list[int] = []
    pretrain(make_pretrain_config(tmp_path), on_step=lambda done, total, metrics: steps.append(done))
    assert steps == [6]
    assert_same_result(tmp_path / "job", pretrained.path)


def test_a_finished_run_returns_its_result_at_once(pretrained: RunResult, make_pretrain_config: MakeConfig) -> None:
    called: list[int] = []
    again = pretrain(make_pretrain_config(pretrained.path.parent), on_step=lambda *arguments: called.append(1))
    assert again == pretrained
    assert not called


def test_micro_batches_and_their_number_do_not_change_the_training(
    pretrained: RunResult, make_pretrain_config: MakeConfig, tmp_path: Path
) -> None:
    split = pretrain(make_pretrain_config(tmp_path, loop__micro_batch_size=1))
    for one, other in zip(numbers(split.path), numbers(pretrained.path), strict=True):
        # Another order of float32 sums, amplified over 6 steps of Muon, which normalizes every update.
        key = "loss" if one["kind"] == "train" else "heldout_loss"
        assert one[key] == pytest.approx(other[key], rel=2e-3)


def test_training_learns(pretrained: RunResult) -> None:
    losses = [line["heldout_loss"] for line in read_metrics(pretrained.path) if line["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.3
    assert pretrained.metrics == {"heldout_loss": losses[-1]}


class Line(Recipe):
    """A recipe of one number, whose loss can be made to go wrong."""

    def __init__(self, bad_step: int = -1, bad: float = float("nan"), model: str = "a") -> None:
        self.bad_step, self.bad, self.model = bad_step, bad, model

    def inputs(self) -> dict[str, str]:
        return {"model": self.model}

    def build(self, world: Any) -> nn.Module:
        return nn.Linear(1, 1)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[float(index)] for index in indices])

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        factor = self.bad if self.bad_step * 4 in batch else 1.0
        loss = model(batch / 100).square().mean() * factor
        return loss, {"rows": torch.tensor(float(len(batch)))}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"heldout_loss": 1.0}

    def export(self, model: nn.Module, path: Path) -> None:
        path.mkdir()
        torch.save(model.state_dict(), path / "weights.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(make_pretrain_config: MakeConfig, tmp_path: Path, bad: float) -> None:
    # Step 5 is neither logged nor saved.
    config = make_pretrain_config(tmp_path, loop__log_every=6)
    with pytest.raises(DivergedError, match=f"loss is {bad} in step 5"):
        run(Line(bad_step=4, bad=bad), config)
    assert (config.run_directory / "checkpoints" / "step-4" / COMPLETE).is_file()
    run(Line(), config)
    expected = run(Line(), make_pretrain_config(tmp_path / "whole", loop__log_every=6))
    assert numbers(config.run_directory) == numbers(expected.path)


def test_another_model_under_the_same_path_is_refused(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    message = r"^the model of this run has changed since it was started: choose another run.name or delete .*job$"
    config = make_pretrain_config(tmp_path)
    with pytest.raises(DivergedError):
        run(Line(bad_step=4), config)
    with pytest.raises(ValueError, match=message):
        run(Line(model="b"), config)
    finished = run(Line(), config)
    with pytest.raises(ValueError, match=message):
        run(Line(model="b"), config)
    assert run(Line(), config) == finished
    (config.run_directory / "inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs.json is corrupt .*: choose another run.name or delete"):
        run(Line(), config)
    (config.run_directory / "inputs.json").unlink()
    with pytest.warns(UserWarning, match=r"inputs.json is missing: cannot tell whether the model of this run"):
        run(Line(), config)


def test_on_step_counts_and_sees_the_metrics(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float | None]] = []
    run(Line(), make_pretrain_config(tmp_path), lambda done, total, m: seen.append((done, total, m.get("rows"))))
    assert seen == [(0, 6, None)] + [(done, 6, 4.0) for done in range(1, 7)]


def test_another_configuration_is_refused_by_name(pretrained: RunResult, make_pretrain_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"optim.lr was 0.01, is 0.5.*choose another run.name"):
        pretrain(make_pretrain_config(pretrained.path.parent, optim__lr=0.5))


def test_a_job_that_failed_before_training_does_not_bind_the_next(
    make_pretrain_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="fewer than one window"):
        pretrain(make_pretrain_config(tmp_path, data__sequence_length=10**6, model__max_position_embeddings=10**6))
    assert pretrain(make_pretrain_config(tmp_path)).export_path.is_dir()


class Unmeasurable(Line):
    """What cannot be evaluated at some step."""

    def __init__(self, num_evaluations: int) -> None:
        super().__init__()
        self.num_evaluations = num_evaluations

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.num_evaluations -= 1
        if self.num_evaluations < 0:
            raise ValueError("nothing to measure")
        return super().evaluate(model)


def test_an_evaluation_that_fails_before_the_first_step_binds_nothing(
    make_pretrain_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        run(Unmeasurable(0), make_pretrain_config(tmp_path))
    assert read_metrics(tmp_path / "job") == []
    assert run(Line(model="b"), make_pretrain_config(tmp_path, optim__lr=0.5)).export_path.is_dir()


def test_an_evaluation_that_fails_loses_no_step(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    whole = run(Line(), make_pretrain_config(tmp_path / "whole", loop__save_every=0))
    config = make_pretrain_config(tmp_path, loop__save_every=0)
    with pytest.raises(ValueError, match="nothing to measure"):
        run(Unmeasurable(2), config)  # the last of three
    steps: list[int] = []
    resumed = run(Line(), config, on_step=lambda done, total, metrics: steps.append(done))
    assert steps == [6] and resumed.metrics == whole.metrics
    assert numbers(resumed.path) == numbers(whole.path)


def test_settings_that_come_too_late_are_said(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    finished = run(Line(), make_pretrain_config(tmp_path))
    stored = (finished.path / "config.yaml").read_bytes()
    with pytest.warns(UserWarning, match="has finished, without what is new: loop.eval_every was 3, is 1$"):
        assert run(Line(), make_pretrain_config(tmp_path, loop__eval_every=1)) == finished
    assert (finished.path / "config.yaml").read_bytes() == stored


def test_out_that_cannot_be_written_is_one_clear_error(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write run directory .*; choose another run.out"):
        pretrain(make_pretrain_config(tmp_path / "file"))


def test_a_full_disk_is_one_clear_error_before_anything_is_lost(
    make_pretrain_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_pretrain_config(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=10))
    with pytest.raises(OSError, match="MiB are free; make room, then run the same command again to resume"):
        pretrain(config)


@pytest.mark.slow
def test_a_write_cut_off_by_the_system_leaves_the_older_checkpoint(
    make_pretrain_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_pretrain_config(tmp_path)
    # After the first checkpoint no file may grow beyond 64 KiB, which is how a full disk or a quota looks from inside.
    limit = (
        "import resource, speedstack.train.core.trainer as trainer\n"
        "save, count = trainer.save_tensors, []\n"
        "def limited(*arguments):\n"
        "    count.append(1)\n"
        "    if len(count) > 2: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "    save(*arguments)\n"
        "trainer.save_tensors = limited\n"
    )
    process = start(config, tmp_path / "job.yaml", limit)
    _, errors = process.communicate(timeout=250)
    assert process.returncode != 0
    last = errors.strip().splitlines()[-1]
    assert "cannot write checkpoint" in last
    assert "step 2 is complete and the same command resumes from it" in last
    with pytest.warns(UserWarning, match="incomplete"):
        result = pretrain(config)
    expected = pretrain(make_pretrain_config(tmp_path / "whole"))
    assert_same_result(result.path, expected.path)


def test_export_failure_says_that_training_is_safe(make_pretrain_config: MakeConfig, tmp_path: Path) -> None:
    class Failing(Line):
        def export(self, model: nn.Module, path: Path) -> None:
            path.mkdir()
            raise OSError(28, os.strerror(28))

    config = make_pretrain_config(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device; training is complete, run the same command again"):
        run(Failing(), config)
    assert not (config.run_directory / "export").exists()
    assert run(Line(), config).export_path.is_dir()

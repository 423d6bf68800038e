"""Jobs mirrored to Weights & Biases: refused before any work, or trained to the end whatever becomes of the mirror."""

from collections.abc import Callable
from pathlib import Path

import pytest

from speedstack.eval.results.metrics import read_metrics
from speedstack.train.config.recipes import PretrainConfig
from speedstack.train.core.loop import RunResult
from speedstack.train.pretrain import PretrainRecipe, pretrain

MakeConfig = Callable[..., PretrainConfig]


class DyingRun:
    """A run whose service has gone."""

    def log(self, values: dict[str, float], step: int) -> None:
        raise BrokenPipeError("the service has gone")

    def finish(self, exit_code: int) -> None:
        raise AssertionError("finished, though it failed before")


def test_online_without_a_key_is_refused_before_any_work(
    make_pretrain_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.login", lambda **options: False)
    monkeypatch.setattr(PretrainRecipe, "build", lambda *arguments: pytest.fail("there was work"))
    config = make_pretrain_config(tmp_path, run__wandb_mode="online", data__corpus=str(tmp_path / "corpus"))
    with pytest.raises(ValueError, match="wandb has no API key"):
        pretrain(config)
    left = {path.name for path in config.run_directory.iterdir()}
    # What is left binds nobody: the next job may have another configuration.
    assert left == {"config.yaml", "env.json", "inputs.json"} and not (tmp_path / "corpus").exists()


def test_a_mirror_that_dies_ends_no_training(
    pretrained: RunResult, make_pretrain_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.init", lambda **options: DyingRun())
    with pytest.warns(UserWarning, match="BrokenPipeError: the service has gone: not mirrored any more") as said:
        result = pretrain(make_pretrain_config(tmp_path, run__wandb_mode="offline"))
    assert len(said) == 1 and result.export_path.is_dir() and result.metrics == pretrained.metrics
    assert [line["step"] for line in read_metrics(result.path)] == [
        line["step"] for line in read_metrics(pretrained.path)
    ]

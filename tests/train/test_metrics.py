import json
from pathlib import Path

import pytest

from speedstack.train.metrics import FILE_NAME, MetricsLog, read_metrics


def test_resume_cuts_the_record_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1 / step})
    log.close()
    # A killed process leaves half a line.
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    log = MetricsLog(tmp_path, resume_step=2)
    log.write("eval", 2, {"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("eval", 2)]
    assert lines[1]["loss"] == 0.5


def test_a_new_run_starts_an_empty_record(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"kind": "train", "step": 1}\n')
    MetricsLog(tmp_path, resume_step=0).close()
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nowhere") == []


def test_wandb_mirrors_the_record_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (values, step)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**options: object) -> Run:
        calls.append(("init", (options["mode"], options["group"])))
        return Run()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = MetricsLog(tmp_path, resume_step=0, wandb_mode="offline", config={})
    log.write("train", 3, {"loss": 2.0})
    log.close()
    assert calls == [
        ("init", ("offline", tmp_path.name)),
        ("log", ({"train/loss": 2.0}, 3)),
        ("finish", None),
    ]


def test_the_environment_switches_the_mirror_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise AssertionError("wandb was started")

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    MetricsLog(tmp_path, resume_step=0, wandb_mode="offline").close()

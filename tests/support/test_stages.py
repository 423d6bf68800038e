"""Stages run once for the same inputs, continue after any interruption, and repeat what a changed setting touches."""

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from speedstack.support.files import exclusive
from speedstack.support.progress import Advance, StageProgress, counting_bar, format_seconds
from speedstack.support.stages import Stage, run_stages, stage_store
from speedstack.support.steps import Step, StepRecord


class Workshop:
    """Three stages in a row, c on b on a, that count their runs; `fail_in` names the one that is interrupted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs: list[str] = []
        self.fail_in = ""
        self.settings = {"a": 1, "b": 1, "c": 1}

    def work(self, name: str) -> str:
        self.runs.append(name)
        (self.directory / name).mkdir(exist_ok=True)
        (self.directory / name / "half").touch()
        if self.fail_in == name:
            raise KeyboardInterrupt
        (self.directory / name / "whole").touch()
        return f"made {name}"

    def stages(self) -> list[Stage]:
        stages: list[Stage] = []
        for name, needs in (("a", ()), ("b", ("a",)), ("c", ("b",))):

            def run(advance: Advance, name: str = name) -> str:
                advance(1, 2)
                return self.work(name)

            step = Step(
                kind=name,
                version=1,
                settings=self.settings[name],
                needs={stage.name: stage.step for stage in stages if stage.name in needs},
                outputs=(name,),
                decisive=(f"{name}/whole",),
            )
            stages.append(Stage(step, run, 1.0))
        return stages

    def go(self) -> list[StepRecord]:
        self.runs = []
        stages = self.stages()
        progress = StageProgress(Console(file=io.StringIO()), {stage.name: 1.0 for stage in stages})
        with progress:
            seconds = run_stages(self.directory, stages, progress)
        records = [record for _, record in stage_store(self.directory).completed()]
        assert seconds == pytest.approx(sum(record.seconds for record in records))
        return records


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_runs_once(workshop: Workshop) -> None:
    records = workshop.go()
    assert workshop.runs == ["a", "b", "c"]
    assert [record.result for record in records] == ["made a", "made b", "made c"]
    assert workshop.go() == records
    assert workshop.runs == []


def test_interrupted_stage_continues_over_what_it_left(workshop: Workshop) -> None:
    workshop.fail_in = "b"
    with pytest.raises(KeyboardInterrupt):
        workshop.go()
    store = stage_store(workshop.directory)
    record = store.record(workshop.stages()[1].step)
    assert record is not None and not record.is_complete and record.seconds > 0
    assert [name for name, _ in store.completed()] == ["a"]
    workshop.fail_in = ""
    assert (workshop.directory / "b" / "half").exists()
    records = workshop.go()
    assert workshop.runs == ["b", "c"]
    assert records[1].seconds > record.seconds


def test_changed_setting_repeats_what_depends_on_it(workshop: Workshop) -> None:
    workshop.go()
    (workshop.directory / "b" / "old").touch()
    workshop.settings["b"] = 2
    workshop.go()
    assert workshop.runs == ["b", "c"]
    assert not (workshop.directory / "b" / "old").exists()


def test_lost_output_is_made_again(workshop: Workshop) -> None:
    workshop.go()
    for file in (workshop.directory / "b").iterdir():
        file.unlink()
    (workshop.directory / "b").rmdir()
    records = workshop.go()
    # What was made from the lost one is made again too: nothing says that the new one is the same.
    assert workshop.runs == ["b", "c"]
    assert workshop.go() == records
    assert workshop.runs == []


def test_lost_decisive_file_starts_the_stage_over(workshop: Workshop) -> None:
    workshop.go()
    (workshop.directory / "b" / "whole").unlink()
    (workshop.directory / "b" / "old").touch()
    workshop.go()
    assert workshop.runs == ["b", "c"]
    assert not (workshop.directory / "b" / "old").exists()


def test_same_stages_have_other_completions_when_made_anew(workshop: Workshop) -> None:
    first = workshop.go()
    workshop.settings["a"] = 2
    workshop.go()
    workshop.settings["a"] = 1
    assert workshop.go() != first
    assert workshop.runs == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "b"}', '{"unknown": 1}'])
def test_unreadable_record_counts_as_none(content: str, workshop: Workshop) -> None:
    workshop.go()
    (workshop.directory / "stages" / "b.json").write_text(content, encoding="utf-8")
    workshop.go()
    assert workshop.runs == ["b", "c"]


def test_record_of_another_version_is_refused_and_nothing_is_deleted(workshop: Workshop) -> None:
    workshop.go()
    record = workshop.directory / "stages" / "b.json"
    record.write_text('{"name": "b", "key": "1", "completion": "2", "seconds": 3.0, "summary": "b"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"b\.json was written by another version of speedstack.*: choose another dir"):
        workshop.go()
    assert workshop.runs == [] and (workshop.directory / "b").exists()


def test_stage_that_writes_nothing_is_not_complete(workshop: Workshop) -> None:
    stage = replace(workshop.stages()[0], run=lambda advance: "nothing")
    progress = StageProgress(Console(file=io.StringIO()), {"a": 1.0})
    with progress, pytest.raises(AssertionError, match="did not write"):
        run_stages(workshop.directory, [stage], progress)
    assert not json.loads((workshop.directory / "stages" / "a.json").read_text(encoding="utf-8"))["completion"]


def test_directory_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(ValueError, match="another process"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("speedstack.support.progress.time.monotonic", lambda: self.now)


def test_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    with StageProgress(Console(file=log), {"a": 10.0, "b": 20.0, "c": 40.0}) as progress:
        assert progress.total_seconds_left() == 70.0
        with progress.stage("a") as advance:
            advance(0, 4)
            clock.now += 5.0
            assert progress.stage_seconds_left() == 5.0
            advance(1, 4, note="loss 3.2")
            assert progress.stage_seconds_left() == 15.0  # a quarter took 5 s
            clock.now += 15.0
        # 20 s instead of 10, after a prior of 60 s as expected: the rest is expected to take 80 / 70 as long.
        assert progress.total_seconds_left() == pytest.approx(60.0 * 80 / 70)
        with progress.stage("b") as advance:
            advance(50, 100)  # resumed in the middle
            clock.now += 10.0
            advance(75, 100)
            assert progress.stage_seconds_left() == 10.0
        progress.skip("c", 30.0)
        assert progress.total_seconds_left() == 0.0
    lines = log.getvalue().splitlines()
    assert lines[0] == "[1/3] a started, about 0:10"
    assert lines[1] == "[1/3] a 25% loss 3.2, 0:15 left, total 1:15 left"
    assert lines[-1] == "[3/3] c done before (0:30)"


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0.4, 59.6, 754, 3723)] == ["0:00", "1:00", "12:34", "1:02:03"]


def test_a_bar_counts_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with counting_bar("reading", "file") as show:
        show(0, 3)
        time.sleep(0.2)  # a bar is not drawn more often
        show(2, 3)
    assert "reading" in (shown := capsys.readouterr().err) and "2/3" in shown
    with counting_bar("reading", "file", is_shown=False) as show:
        show(1, 1)
    assert capsys.readouterr().err == ""

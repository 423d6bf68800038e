"""Stages: steps in sequence, with outputs in the job's directory and with progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speedstack.support.progress import Advance, StageProgress
from speedstack.support.steps import Step, StepStore

RECORDS = "stages"


@dataclass(frozen=True)
class Stage:
    """A step, and `run(advance)`, which makes it and returns a one-line summary."""

    step: Step
    run: Callable[[Advance], str]
    expected_seconds: float

    @property
    def name(self) -> str:
        """The step's name."""
        return self.step.name


def stage_store(directory: Path) -> StepStore:
    """The stages of the job in `directory`, with records in `stages/<name>.json`; a result is the summary line."""
    return StepStore(directory, f"{RECORDS}/{{name}}.json")


def run_stages(directory: Path, stages: Sequence[Stage], progress: StageProgress) -> float:
    """Complete every stage in order; returns their seconds, including earlier processes'.

    Raises as the stages; the next call resumes there. The caller has locked the directory.
    """
    store, seconds = stage_store(directory), 0.0
    for stage in stages:
        if store.is_done(stage.step):
            record = store.record(stage.step)
            assert record is not None
            progress.skip(stage.name, record.seconds)
        else:
            with progress.stage(stage.name) as advance:
                store.make(stage.step, _runner(stage, advance))
            record = store.record(stage.step)
            assert record is not None and record.is_complete
        seconds += record.seconds
    return seconds


def _runner(stage: Stage, advance: Advance) -> Callable[[Mapping[str, Path], Path], str]:
    return lambda needs, directory: stage.run(advance)

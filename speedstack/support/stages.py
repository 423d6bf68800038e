"""Stages: steps one after the other, with outputs where people look for them and with progress that says how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speedstack.support.progress import Advance, StageProgress
from speedstack.support.steps import Step, StepStore

RECORDS = "stages"


@dataclass(frozen=True)
class Stage:
    """A step, and `run(advance)` that makes it and returns one line on what came out."""

    step: Step
    run: Callable[[Advance], str]
    expected_seconds: float

    @property
    def name(self) -> str:
        """The step's."""
        return self.step.name


def stage_store(directory: Path) -> StepStore:
    """The stages of the job in `directory`, whose records lie in `stages/<name>.json`; a result is that one line."""
    return StepStore(directory, f"{RECORDS}/{{name}}.json")


def run_stages(directory: Path, stages: Sequence[Stage], progress: StageProgress) -> float:
    """Bring every stage to completion, in order; returns their seconds, those of earlier processes too.

    Raises whatever a stage raises; the next call goes on there. The caller has locked the directory.
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

"""Mirrors a run's metrics, or a report's curves and tables, to Weights & Biases; our files stay authoritative.

wandb's errors share no base class, so all are caught here and become one line: an error before work starts, a warning
later. WANDB_MODE=disabled or offline overrides every config.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from speedstack.eval.results.failures import one_line
from speedstack.eval.results.labels import numbered

if TYPE_CHECKING:
    import wandb

    from speedstack.eval.report.page import Section
    from speedstack.eval.results.report import Report
    from speedstack.eval.results.table import Table

Mode = Literal["disabled", "offline", "online"]
PROJECT = "speedstack"
WAY_OUT = "set wandb_mode to offline, which keeps the run in files"
# Scalars are uploaded in seconds; a network that is gone must not hold the GPUs of a finished job.
FINISH_SECONDS = 120.0


class Mirror:
    """A job's run in W&B, as a context that finishes it (as failed on an error).

    After the first failure of wandb it warns once and stops mirroring; the job goes on.
    """

    def __init__(self) -> None:
        self._run: wandb.Run | None = None

    def start(self, mode: Mode, directory: Path, config: dict[str, Any] | None = None) -> None:
        """Start before there is work to lose. Raises ValueError if an `online` run cannot be started."""
        try:
            self._run = start_run(mode, directory, directory.name, config)
        except ValueError as error:
            if _allowed(mode) == "online":
                raise
            self._give_up(error)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the metrics of a step; steps only rise."""
        if self._run is None:
            return
        try:
            with _one_line_errors("wandb failed in the middle of the run"):
                self._run.log(values, step=step)
        except ValueError as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._run is None:
            return
        try:
            with _one_line_errors("wandb failed"):
                self._run.finish(exit_code=0 if kind is None else 1)
        except ValueError as failure:
            self._give_up(failure)

    def _give_up(self, error: ValueError) -> None:
        self._run = None
        warnings.warn(f"{error}: not mirrored any more, metrics.jsonl goes on", stacklevel=3)


def start_run(mode: Mode, directory: Path, name: str, config: dict[str, Any] | None = None) -> wandb.Run | None:
    """A run of this name that writes below `directory`, or None if wandb is disabled.

    Runs of one directory form a group: a resumed job is a new run. Raises ValueError if wandb cannot be started, and
    for `online` without a valid key.
    """
    mode = _allowed(mode)
    if mode == "disabled":
        return None
    cannot = f"wandb cannot be started {mode}" + (f" ({WAY_OUT})" if mode == "online" else "")
    with _one_line_errors(cannot):
        import wandb

        # A job must not wait at a prompt that nobody sees.
        has_key = mode == "offline" or wandb.login(prompt=False, verify=True)
    if not has_key:
        raise ValueError(f"wandb has no API key: give it one with `wandb login` or WANDB_API_KEY, or {WAY_OUT}")
    with _one_line_errors(cannot):
        return wandb.init(
            mode=mode,
            dir=directory,
            project=PROJECT,
            name=name,
            group=f"{name}-{hashlib.sha256(os.path.abspath(directory).encode()).hexdigest()[:8]}",
            config=config,
            # The screen is the progress bar's; online, the address of the run is worth its lines.
            settings=wandb.Settings(silent=mode == "offline", console="off", finish_timeout=FINISH_SECONDS),
        )


def mirror_report(report: Report, directory: Path, mode: Mode) -> bool:
    """Log a report's curves over the steps of their stages, its tables, and its headlines as the summary.

    Numbers in tables are numbers, dashes None. Returns whether anything was logged. Raises ValueError if wandb fails.
    """
    if _allowed(mode) == "disabled":
        return False
    # Here, so that a training job does not import what draws.
    from speedstack.eval.report.render import report_sections
    from speedstack.eval.results.table import Table

    shown = report_sections(report)
    tables = {section.title: [block for block in section.blocks if isinstance(block, Table)] for section in shown}
    config = {"created_utc": report.created_utc, "seed": report.seed}
    run = start_run(mode, directory, report.title, config)
    if run is None:
        return False
    import wandb

    with _one_line_errors("the report is written, but wandb failed"):
        stages = list(dict.fromkeys(curve.stage for curve in report.curves))
        # To wandb, a dot in the name of a metric is a path into its value.
        for stage, series in zip(stages, numbered([stage.replace(".", "_") for stage in stages]), strict=True):
            step_metric = f"{series}/step"
            run.define_metric(step_metric, hidden=True)
            rows: dict[int, dict[str, float]] = defaultdict(dict)
            for curve in report.curves:
                if curve.stage != stage:
                    continue
                name = f"{series}/{curve.label}: {curve.quantity}"
                # By its full name: a pattern would take in the stages whose names begin like this one's.
                run.define_metric(name, step_metric=step_metric)
                for step, value in zip(curve.steps, curve.values, strict=True):
                    rows[step][name] = value
            for step, values in sorted(rows.items()):
                run.log({step_metric: step, **values})
        for title, blocks in tables.items():
            for index, table in enumerate(blocks, start=1):
                name = title if len(blocks) == 1 else f"{title} {index}"
                run.log({name: wandb.Table(columns=_headings(table), data=_rows(table))})
        run.summary.update(_summary(shown))
        run.finish()
    return True


def _allowed(mode: Mode) -> Mode:
    """The mode, restricted by WANDB_MODE."""
    limit = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""))
    if limit == "disabled" or mode == "disabled":
        return "disabled"
    return "offline" if limit == "offline" else mode


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turns any error of wandb into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def _summary(shown: Sequence[Section]) -> dict[str, str]:
    """Headline values by label, with the section's title if a label repeats."""
    found = [(section.title, headline) for section in shown for headline in section.headlines]
    count = Counter(headline.label for _, headline in found)
    return {
        headline.label if count[headline.label] == 1 else f"{title}: {headline.label}": headline.value
        for title, headline in found
    }


def _headings(table: Table) -> list[str | int]:
    """Unique titles with their units."""
    return list(
        numbered([f"{column.title} ({column.unit})" if column.unit else column.title for column in table.columns])
    )


def _rows(table: Table) -> list[list[Any]]:
    return [
        [cell.value if column.is_number else cell.text for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]

"""What Weights & Biases gets to see: a run of metrics, or a report's curves and tables. Files of ours stay the truth.

WANDB_MODE=disabled in the environment wins over every config, so that a machine or a test suite can rule it out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import wandb

    from speedstack.eval.page import Table
    from speedstack.eval.results import Report

Mode = Literal["disabled", "offline", "online"]
PROJECT = "speedstack"


def start_run(mode: Mode, directory: Path, group: str, config: dict[str, Any] | None = None) -> wandb.Run | None:
    """A run that writes below `directory`, None where wandb is disabled."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    import wandb

    return wandb.init(
        mode=mode,
        dir=directory,
        project=PROJECT,
        group=group,
        config=config,
        # The screen is the progress bar's; online, the address of the run is worth its lines.
        settings=wandb.Settings(silent=mode == "offline", console="off"),
    )


def mirror_report(report: Report, directory: Path, mode: Mode) -> bool:
    """Log the curves of `report` over their stages' steps, its tables, and its main figures as the summary.

    Returns whether anything was logged. Numbers in tables are numbers, a dash is None.
    """
    run = start_run(mode, directory, report.title, {"created_utc": report.created_utc, "seed": report.seed})
    if run is None:
        return False
    import wandb

    # Here, so that a training job does not import what draws.
    from speedstack.eval.page import Table
    from speedstack.eval.report import report_sections

    for stage in dict.fromkeys(curve.stage for curve in report.curves):
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    for curve in report.curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            run.log({f"{curve.stage}/step": step, f"{curve.stage}/{curve.label}: {curve.quantity}": value})
    for section in report_sections(report):
        tables = [block for block in section.blocks if isinstance(block, Table)]
        for index, table in enumerate(tables, start=1):
            name = section.title if len(tables) == 1 else f"{section.title} {index}"
            run.log({name: wandb.Table(columns=_headings(table), data=_rows(table))})
        for headline in section.headlines:
            run.summary[headline.label] = headline.value
    run.finish()
    return True


def _headings(table: Table) -> list[str | int]:
    return [f"{column.title} ({column.unit})" if column.unit else column.title for column in table.columns]


def _rows(table: Table) -> list[list[Any]]:
    return [
        [cell.value if column.is_number else cell.text for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]

"""The `report` verb: one page of finished runs and result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedstack.eval.config import ReportConfig
from speedstack.verbs.named_files import load_naming_files


def load_report_config(path: Path | None, overrides: Sequence[str]) -> ReportConfig:
    """The verb's config; runs and result files may be named in place of a YAML file."""
    return load_naming_files(ReportConfig, "inputs", path, overrides)


def report(config: ReportConfig) -> None:
    """Write report.html and report.json."""
    from speedstack.eval.report.gather import gather
    from speedstack.eval.report.render import write_report
    from speedstack.eval.report.wandb_mirror import mirror_report
    from speedstack.eval.results.environment import command_line

    found = gather(config.inputs, config.title, commands=tuple(filter(None, [command_line()])))
    config.out.mkdir(parents=True, exist_ok=True)
    for path in write_report(found, config.out):
        print(f"written: {path}")
    if mirror_report(found, config.out, config.wandb_mode):
        print(f"mirrored: {config.out / 'wandb'}")

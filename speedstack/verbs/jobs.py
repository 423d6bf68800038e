"""The verbs that run one job: each takes its config, does the work through the package that owns it, and says where the
result lies. Anything longer than that belongs into the package.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from speedstack.eval.config import CompareConfig, ReportConfig, VerbConfig
from speedstack.train.config.recipes import DrafterConfig, PretrainConfig, QatConfig

if TYPE_CHECKING:
    from speedstack.train.core.loop import RunResult

VerbConfigT = TypeVar("VerbConfigT", bound=VerbConfig)


def pretrain(config: PretrainConfig) -> None:
    """Train a model from scratch."""
    from speedstack.train.pretrain import pretrain as run

    _show_run(run(config))


def qat(config: QatConfig) -> None:
    """Quantization-aware training."""
    from speedstack.train.qat.recipe import qat as run

    _show_run(run(config))


def drafter(config: DrafterConfig) -> None:
    """Train a drafter."""
    from speedstack.train.drafter.job import train_drafter

    _show_run(train_drafter(config))


def load_compare_config(path: Path | None, overrides: Sequence[str]) -> CompareConfig:
    """As every verb's; instead of a YAML file, the result files may be named one after the other."""
    if path is not None and not _is_yaml(path) and (not overrides or overrides[0].startswith("-")):
        raise ValueError("compare needs two result files or more: speedstack compare A.json B.json")
    return _load_naming_files(CompareConfig, "results", path, overrides)


def load_report_config(path: Path | None, overrides: Sequence[str]) -> ReportConfig:
    """As every verb's; instead of a YAML file, runs and result files may be named one after the other."""
    return _load_naming_files(ReportConfig, "inputs", path, overrides)


def _load_naming_files(
    config: type[VerbConfigT], field: str, path: Path | None, overrides: Sequence[str]
) -> VerbConfigT:
    """The config from a YAML file, or with the paths before the first flag in `field`."""
    from speedstack.train.config.recipes import load_config

    if path is None or _is_yaml(path):
        return load_config(config, path, overrides)
    flags = list(itertools.dropwhile(lambda argument: not argument.startswith("-"), overrides))
    named = [str(path), *overrides[: len(overrides) - len(flags)]]
    return load_config(config, None, [f"--{field}", *named, *flags])


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def compare(config: CompareConfig) -> None:
    """Results of one suite, side by side."""
    from speedstack.eval.lm_eval.compare import compare_results
    from speedstack.eval.results.suite import SuiteResult

    places = [path.resolve() for path in config.results]
    if twice := [str(path) for path, place in zip(config.results, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"compare takes different result files, and {' and '.join(twice)} are one")
    comparison = compare_results(
        {str(path): SuiteResult.load(path) for path in config.results},
        significance=config.significance,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    print(comparison.markdown())
    if config.out is not None:
        _show_path(comparison.save_markdown(config.out) if config.out.suffix == ".md" else comparison.save(config.out))


def report(config: ReportConfig) -> None:
    """Write report.html and report.json."""
    from speedstack.eval.report.gather import gather
    from speedstack.eval.report.render import write_report
    from speedstack.eval.report.wandb_mirror import mirror_report
    from speedstack.eval.results.environment import command_line

    found = gather(config.inputs, config.title, commands=tuple(filter(None, [command_line()])))
    config.out.mkdir(parents=True, exist_ok=True)
    for path in write_report(found, config.out):
        _show_path(path)
    if mirror_report(found, config.out, config.wandb_mode):
        _show_path(config.out / "wandb", "mirrored")


def _show_run(result: RunResult) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    for name, value in result.metrics.items():
        print(f"{name}: {value:.5g}")
    _show_path(result.path, "run")
    _show_path(result.export_path, "export")


def _show_path(path: Path, label: str = "written") -> None:
    print(f"{label}: {path}")

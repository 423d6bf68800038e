"""The verbs `pretrain`, `qat` and `drafter`: run the recipe's job and print where its result is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from speedstack.train.config.recipes import DrafterConfig, PretrainConfig, QatConfig

if TYPE_CHECKING:
    from speedstack.train.core.loop import RunResult


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


def _show_run(result: RunResult) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    for name, value in result.metrics.items():
        print(f"{name}: {value:.5g}")
    print(f"run: {result.path}")
    print(f"export: {result.export_path}")

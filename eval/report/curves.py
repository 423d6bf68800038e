"""Curves of a training run, read from its metrics.jsonl."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from speedstack.eval.results.metrics import FILE_NAME, read_metrics
from speedstack.eval.results.report import Curve
from speedstack.eval.results.table import plural

CROSS_ENTROPY = "cross-entropy (nats a token)"
KL = "KL from the teacher (nats a token)"
MIXTURE = "weighted cross-entropy and KL (nats a token)"
WEIGHTED = "position-weighted cross-entropy (nats a token)"
ACCEPTANCE = "acceptance length (tokens a round)"
UNKNOWN = "training loss (nats a token)"
# What recipes call their loss is not one quantity: loss -> its axis, by what the run's config says it trained on.
TRAIN_LOSS = {"pretrain": CROSS_ENTROPY, "kl": KL, "ce": CROSS_ENTROPY, "mix": MIXTURE, "drafter": WEIGHTED}


def run_curves(run_directory: Path, on_problem: Callable[[str], object] = warnings.warn) -> list[Curve]:
    """The curves of a run; their stage is the run's name.

    `on_problem` gets a line for unreadable lines, non-finite values, and a config that does not name the loss. Raises
    OSError for files that cannot be read.
    """
    lines = read_metrics(run_directory, on_problem)
    recipe, loss = _recipe(run_directory / "config.yaml", on_problem)
    metrics = {
        ("train", "loss"): ("training", loss),
        ("eval", "heldout_loss"): ("held-out", WEIGHTED if recipe == "drafter" else CROSS_ENTROPY),
        ("eval", "heldout_kl"): ("held-out", KL),
        ("eval", "acceptance_length"): ("held-out", ACCEPTANCE),
    }
    curves = []
    for (kind, name), (label, quantity) in metrics.items():
        found = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
        if points := _points(found, f"{run_directory / FILE_NAME}: {name}", on_problem):
            steps, values = zip(*points, strict=True)
            curves.append(Curve(stage=run_directory.name, label=label, quantity=quantity, steps=steps, values=values))
    return curves


def _points(
    found: Sequence[tuple[int, Any]], name: str, on_problem: Callable[[str], object]
) -> list[tuple[int, float]]:
    """Steps, unique and ascending, with their values; non-finite ones are dropped."""
    if left_out := [(step, value) for step, value in found if not _is_finite(value)]:
        step, value = left_out[0]
        lacking = f"{len(left_out)} of {plural(len(found), 'value')}"
        on_problem(f"{name} is no finite number in {lacking}, the first {value} at step {step}: left out")
    # Of a step that is there twice the later line counts.
    return sorted({step: float(value) for step, value in found if _is_finite(value)}.items())


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _recipe(file: Path, on_problem: Callable[[str], object]) -> tuple[str, str]:
    """The kind of the run and its training loss' axis label, from its config."""
    if not file.is_file():
        return "", UNKNOWN
    try:
        config = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        on_problem(f"{file} is not YAML ({' '.join(str(error).split())}): what its run's loss is remains unknown")
        return "", UNKNOWN
    config = config if isinstance(config, dict) else {}
    kind = config.get("kind")
    section = config.get("qat")
    trained_on = section.get("objective") if kind == "qat" and isinstance(section, dict) else kind
    return str(kind or ""), TRAIN_LOSS.get(str(trained_on), UNKNOWN)

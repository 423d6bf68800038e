"""One `Report` from whatever finished work is found: run directories, result files, a whole demo.

Everything is read from disk, hence the demo's own report and `speedstack report` of its directory are one code path,
and a half-finished demo can be reported too. Of two results of a kind, the one given later wins, and within a
directory the one nearer to its top.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from speedstack.eval.environment import describe_environment
from speedstack.eval.report import utc_now
from speedstack.eval.results import (
    AcceptanceResult,
    Curve,
    Document,
    Example,
    ExpertStorage,
    ModelSummary,
    QualityResult,
    Report,
    StageSummary,
    TimingResult,
)
from speedstack.stages import RECORDS, read_records
from speedstack.train.metrics import FILE_NAME, read_metrics

RESULTS: dict[str, type[Document]] = {
    "quality": QualityResult,
    "acceptance": AcceptanceResult,
    "timing": TimingResult,
}
# Results that are files of their own and have no place in a report.
OTHER_KINDS = ("sensitivity", "quantize", "ptq", "conversion")
FACTS = ("model", "storage", "memory_bytes", "examples")
CROSS_ENTROPY = "cross-entropy (nats a token)"
KL = "KL from the teacher (nats a token)"
MIXTURE = "weighted cross-entropy and KL (nats a token)"
WEIGHTED = "position-weighted cross-entropy (nats a token)"
ACCEPTANCE = "acceptance length (tokens a round)"
# What recipes call their loss is not one quantity: loss -> its axis, by what the run's config says it trained on.
TRAIN_LOSS = {"pretrain": CROSS_ENTROPY, "kl": KL, "ce": CROSS_ENTROPY, "mix": MIXTURE, "drafter": WEIGHTED}


class Facts(Document):
    """What a demo notes besides the measurements: the model, its storage, texts to look at."""

    kind: Literal["facts"] = "facts"
    model: ModelSummary | None = None
    storage: tuple[ExpertStorage, ...] = ()
    memory_bytes: dict[str, dict[str, int]] = Field(default={}, description="engine -> part -> bytes")
    examples: tuple[Example, ...] = ()


def gather(inputs: Sequence[Path], title: str, **fields: Any) -> Report:
    """A report of everything below `inputs`; `fields` are set as they are (subtitle, seed, commands).

    Results of kinds that a report has no place for, of sensitivity say, are named in its notes. Raises ValueError for
    an input that does not exist, a result file of another schema, and when nothing is found.
    """
    parts: dict[str, Any] = {}
    curves: list[Curve] = []
    stages: list[StageSummary] = []
    left_out: list[str] = []
    for path in inputs:
        if not path.exists():
            raise ValueError(f"nothing at {path}; give run directories or result files with --inputs")
        for file in _find(path):
            if file.name == FILE_NAME:
                curves += run_curves(file.parent)
                continue
            if (kind := _kind(file)) in OTHER_KINDS:
                left_out.append(f"{file} ({kind})")
                continue
            loaded = _load(file, kind)
            loaded["memory_bytes"] = parts.get("memory_bytes", {}) | loaded.get("memory_bytes", {})
            parts |= loaded
        stages += [StageSummary(name=r.name, summary=r.summary, seconds=r.seconds) for r in read_records(path)]
    if not parts and not curves:
        hint = f" that a report shows; there are {', '.join(left_out)}" if left_out else ""
        raise ValueError(f"no finished run or result in {', '.join(map(str, inputs))}{hint}")
    timing = parts.get("timing")
    if left_out:
        fields["notes"] = (*fields.get("notes", ()), f"Not shown in this report: {', '.join(left_out)}")
    return Report(
        title=title,
        created_utc=utc_now(),
        # A report may be made elsewhere, or later, than its times were measured.
        environment=(timing and timing.environment) or describe_environment(),
        stages=tuple(stages),
        curves=tuple(curves),
        **parts,
        **fields,
    )


def run_curves(run_directory: Path) -> list[Curve]:
    """What the metrics of a training run plot; the stage is the run's name."""
    lines = read_metrics(run_directory)
    recipe, loss = _recipe(run_directory)
    metrics = {
        ("train", "loss"): ("training", loss),
        ("eval", "heldout_loss"): ("held-out", WEIGHTED if recipe == "drafter" else CROSS_ENTROPY),
        ("eval", "heldout_kl"): ("held-out", KL),
        ("eval", "acceptance_length"): ("held-out", ACCEPTANCE),
    }
    curves = []
    for (kind, name), (label, quantity) in metrics.items():
        points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(stage=run_directory.name, label=label, quantity=quantity, steps=steps, values=values))
    return curves


def _recipe(run_directory: Path) -> tuple[str, str]:
    """The kind of the run and the axis of its training loss, from its config; metrics alone do not say."""
    file = run_directory / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = config.get("kind", "")
    trained_on = config["qat"]["objective"] if kind == "qat" else kind
    return kind, TRAIN_LOSS.get(trained_on, "training loss (nats a token)")


def _find(path: Path) -> list[Path]:
    """Metrics and results at `path` or in it and the directories in it, the outermost last, so that it wins."""
    if path.is_file():
        return [path]
    names = [FILE_NAME, "facts.json", "examples.json", *(f"{kind}.json" for kind in (*RESULTS, *OTHER_KINDS))]
    directories = [*sorted(child for child in path.iterdir() if child.is_dir() and child.name != RECORDS), path]
    return [directory / name for directory in directories for name in names if (directory / name).is_file()]


def _kind(file: Path) -> object:
    """The kind that a result file says it is of. Raises ValueError for a file that is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("kind")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is not a result file: {error}") from error


def _load(file: Path, kind: object) -> dict[str, Any]:
    """The report's fields that a result file holds. Raises ValueError for a file of another kind."""
    if kind == Facts.model_fields["kind"].default:
        facts = Facts.load(file)
        return {name: value for name in FACTS if (value := getattr(facts, name))}
    if not isinstance(kind, str) or kind not in RESULTS:
        raise ValueError(f"{file} is not a result file: its kind is {kind!r}, not {', '.join(RESULTS)}")
    return {kind: RESULTS[kind].load(file)}

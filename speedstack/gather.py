"""One `Report` from whatever finished work is found: run directories, result files, a whole demo.

Everything is read from disk, hence the demo's own report and `speedstack report` of its directory are one code path,
and a half-finished demo can be reported too. Inputs are read in their order, a directory before the ones in it. Of the
measurements that a run has one of, the first of a kind is the run's own, and all others are attached beside it; but a
directory's own measurement stands for those of its kind in the runs inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from speedstack.eval import sections
from speedstack.eval.environment import describe_environment
from speedstack.eval.report import utc_now
from speedstack.eval.results import (
    Attachment,
    Curve,
    Document,
    Environment,
    Example,
    ExpertStorage,
    ModelSummary,
    Report,
    StageSummary,
    read_json,
)
from speedstack.stages import RECORDS, read_records
from speedstack.train.metrics import FILE_NAME, read_metrics

# Fields of a report that one measurement each has.
OWN = ("quality", "acceptance", "timing")
FACTS_KIND, REPORT_KIND = "facts", "report"
FACTS_FILE, REPORT_FILE = "facts.json", "report.json"
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

    A report among the inputs gives what it holds. Results of kinds that no page shows, a plan say, are named in the
    notes. Raises ValueError for an input that does not exist, a result file of another schema, and when nothing is
    found.
    """
    gathered = _Gathered()
    for path in inputs:
        if not path.exists():
            raise ValueError(f"nothing at {path}: give run directories or result files")
        kinds_on_top: set[str | None] = set()
        for file in _find(path):
            content = None if file.name == FILE_NAME else read_json(file)
            if content is None:
                gathered.curves += run_curves(file.parent)
            elif (kind := sections.kind_of(content)) in OWN and file.parent != path and kind in kinds_on_top:
                continue
            else:
                gathered.add(file, content, is_named=file == path)
                if file.parent == path:
                    kinds_on_top.add(kind)
        if path.is_dir():
            gathered.stages += [
                StageSummary(name=r.name, summary=r.summary, seconds=r.seconds) for r in read_records(path)
            ]
    if gathered.is_empty:
        hint = f" that a report shows; there are {', '.join(gathered.left_out)}" if gathered.left_out else ""
        raise ValueError(f"no finished run or result in {', '.join(map(str, inputs))}{hint}")
    return gathered.report(title, fields)


class _Gathered:
    """What was found so far; the first of what there can be one of stays."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.curves: list[Curve] = []
        self.stages: list[StageSummary] = []
        self.attached: list[Attachment] = []
        self.reports: list[Report] = []
        self.left_out: list[str] = []

    @property
    def is_empty(self) -> bool:
        return not (self.parts or self.curves or self.attached or self.stages)

    def add(self, file: Path, content: Any, is_named: bool) -> None:
        """Take in a file's JSON. Raises ValueError for content that does not fit its kind, and for a file that was
        named and is no result.
        """
        kind = sections.kind_of(content)
        if kind == FACTS_KIND:
            self._take_run(Facts.check(content, file))
        elif kind == REPORT_KIND:
            self._take_report(Report.check(content, file), file)
        elif kind in sections.MODULES:
            self._take_result(kind, sections.check(kind, content, str(file)), _shown(file), content)
        elif kind is not None:
            self.left_out.append(f"{_shown(file)} ({kind})")
        elif is_named:
            raise ValueError(f"{file} is not a result file: it names no kind and schema version of ours")

    def report(self, title: str, fields: dict[str, Any]) -> Report:
        """All of it."""
        notes = [note for report in self.reports for note in report.notes]
        if self.left_out:
            notes.append(f"Not shown in this report: {', '.join(self.left_out)}")
        commands = [command for report in self.reports for command in report.commands]
        given: dict[str, Any] = {
            "notes": (*fields.pop("notes", ()), *notes),
            "commands": tuple(dict.fromkeys((*commands, *fields.pop("commands", ())))),
        }
        if len(self.reports) == 1 and self.attached == list(self.reports[0].attached):
            given |= {"subtitle": self.reports[0].subtitle, "seed": self.reports[0].seed}
        return Report(
            title=title,
            created_utc=utc_now(),
            environment=self._environment(),
            stages=tuple(self.stages),
            curves=tuple(self.curves),
            attached=tuple(self.attached),
            **self.parts,
            **(given | fields),
        )

    def _environment(self) -> Environment:
        """A report may be made elsewhere, or later, than its figures were measured."""
        own = [self.parts.get(kind) for kind in ("timing", "acceptance", "quality")]
        measured = [sections.environment_of(result) for result in own if result is not None]
        measured += [report.environment for report in self.reports]
        for attachment in self.attached:
            kind = sections.kind_of(attachment.content)
            assert kind is not None
            measured.append(sections.environment_of(sections.check(kind, attachment.content, attachment.name)))
        return next((environment for environment in measured if environment is not None), describe_environment())

    def _take_run(self, facts: Facts | Report) -> None:
        """The fields that a run has once; bytes are added to those of other engines."""
        for name in ("model", "storage", "examples"):
            if value := getattr(facts, name):
                self.parts.setdefault(name, value)
        if facts.memory_bytes:
            known = self.parts.get("memory_bytes", {})
            self.parts["memory_bytes"] = known | {k: v for k, v in facts.memory_bytes.items() if k not in known}

    def _take_report(self, report: Report, file: Path) -> None:
        self.reports.append(report)
        self._take_run(report)
        self.curves += report.curves
        self.stages += report.stages
        self.attached += report.attached
        for kind in OWN:
            if (result := getattr(report, kind)) is not None:
                self._take_result(kind, result, _shown(file), result.model_dump(mode="json"))

    def _take_result(self, kind: str, result: Any, name: str, content: dict[str, Any]) -> None:
        if kind in OWN and kind not in self.parts:
            self.parts[kind] = result
        else:
            self.attached.append(Attachment(name=name, content=content))


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


def _find(path: Path) -> Iterator[Path]:
    """Metrics and JSON files at `path`, or in it and then in the directories in it."""
    if path.is_file():
        yield path
        return
    # A page made before is made of the files beside it.
    skipped = (REPORT_FILE,)
    for directory in (path, *sorted(child for child in path.iterdir() if child.is_dir() and child.name != RECORDS)):
        if (directory / FILE_NAME).is_file():
            yield directory / FILE_NAME
        yield from sorted(
            (file for file in directory.glob("*.json") if file.name not in skipped),
            key=lambda file: (file.name != FACTS_FILE, file.name),
        )


def _shown(file: Path) -> str:
    """A file's name on the page: below the working directory, where it is there."""
    resolved = file.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(file)

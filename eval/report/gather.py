"""Gathers finished work into one `Report`: run directories, result files, demos, or several of these.

Everything is read from disk, so that a demo's own report and `speedstack report` share a code path, and unfinished
demos can be reported. Inputs are read in order, a directory before those inside it, and each file once. The first
measurement of a kind is the run's own, later ones are attached; a directory's measurement replaces those of its kind in
the runs inside it.

Curves, stages, models, memory and texts of several runs are kept by directory, and named by the shortest path ending
that tells the runs apart. A file that is unreadable or no result is an error if it was named, and a note if it was
found in a directory.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.eval.report import sections
from speedstack.eval.report.curves import run_curves
from speedstack.eval.report.render import utc_now
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.labels import printable, short_names
from speedstack.eval.results.metrics import FILE_NAME
from speedstack.eval.results.report import Attachment, Curve, Example, ExpertStorage, ModelSummary, Report, StageSummary
from speedstack.eval.results.schema import Document, Environment, read_json
from speedstack.support.stages import RECORDS, stage_store

# Fields of a report that one measurement each has.
OWN = ("quality", "acceptance", "timing")
FACTS_KIND, REPORT_KIND = "facts", "report"
FACTS_FILE, REPORT_FILE = "facts.json", "report.json"
# A run, or a stage of one, as the parts of its path.
Place = tuple[str, ...]


class Facts(Document):
    """What a demo records besides measurements."""

    kind: Literal["facts"] = "facts"
    model: ModelSummary | None = None
    storage: tuple[ExpertStorage, ...] = ()
    memory_bytes: dict[str, dict[str, int]] = Field(default={}, description="engine -> part -> bytes")
    examples: tuple[Example, ...] = ()


def gather(inputs: Sequence[Path], title: str, **fields: Any) -> Report:
    """A report of everything below `inputs`; `fields` are set as given (subtitle, seed, commands).

    Reports among the inputs are unpacked. Notes name results that no page shows, unreadable files, and empty inputs.
    Raises ValueError for a missing input, a named file that is no result, and if nothing is found; OSError as the file
    system does.
    """
    gathered = _Gathered()
    for path in inputs:
        if not path.exists():
            raise ValueError(f"nothing at {path}: give run directories or result files")
        num_before = gathered.num_found
        if path.is_file():
            gathered.add_named(path)
        else:
            # Demos in a directory are read as if they had been named: each has measurements of its own, and runs in it.
            demos = [child for child in _children(path) if (child / RECORDS).is_dir()]
            gathered.add_run(path, [child for child in _children(path) if child not in demos])
            for demo in demos:
                gathered.add_run(demo, _children(demo))
            if gathered.num_found == num_before and (path / REPORT_FILE).is_file():
                gathered.add_named(path / REPORT_FILE)
        if gathered.num_found == num_before:
            gathered.note(f"There is no result in {_shown(path)}")
    if gathered.is_empty:
        hint = f" that a report shows; there are {'; '.join(gathered.left_out)}" if gathered.left_out else ""
        raise ValueError(f"no finished run or result in {', '.join(map(str, inputs))}{hint}")
    return gathered.report(title, fields)


def _children(directory: Path) -> list[Path]:
    return sorted(child for child in directory.iterdir() if child.is_dir() and child.name != RECORDS)


def _files(directory: Path) -> list[Path]:
    """A directory's metrics and JSON files, without a report made of them before."""
    found = [file for file in directory.glob("*.json") if file.is_file() and file.name != REPORT_FILE]
    metrics = [file for file in (directory / FILE_NAME,) if file.is_file()]
    return metrics + sorted(found, key=lambda file: (file.name != FACTS_FILE, file.name))


@dataclass(frozen=True)
class _Part:
    """A curve or a stage, its place, and the report it was read from (None for the run's own directory)."""

    place: Place
    content: Curve | StageSummary
    report: Path | None = None


class _Gathered:
    """What was found so far. Warnings come at the end.

    `num_found` counts files, repeated and skipped ones included.
    """

    def __init__(self) -> None:
        self.num_found = 0
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self._own: dict[str, tuple[Path, Any]] = {}
        self._parts: list[_Part] = []
        self._facts: dict[Place, dict[str, Any]] = {}
        self._attached: list[Attachment] = []
        self._reports: list[Report] = []
        self._read: set[Path] = set()

    @property
    def is_empty(self) -> bool:
        return not (self._own or self._parts or self._facts or self._attached)

    def note(self, text: str) -> None:
        """Add a line to the page and to the warnings."""
        if text not in self.notes:
            self.notes.append(text)

    def add_named(self, file: Path) -> None:
        """Add a file that was asked for. Raises ValueError if it is no result."""
        if file.name == FILE_NAME:
            self._add(file, None)
            return
        content = read_json(file)
        if sections.kind_of(content) is None:
            raise ValueError(f"{file} is not a result file: it names no kind and schema version of ours")
        self._add(file, content)

    def add_run(self, directory: Path, inner: Sequence[Path]) -> None:
        """Add the files of a directory, of those inside it, and the stages its records name."""
        kinds_on_top: set[str | None] = set()
        for place in (directory, *inner):
            for file in _files(place):
                try:
                    content = None if file.name == FILE_NAME else read_json(file)
                    kind = sections.kind_of(content)
                    if place == directory:
                        kinds_on_top.add(kind)
                    elif kind in OWN and kind in kinds_on_top:
                        continue
                    self._add(file, content)
                except (ValueError, OSError) as error:
                    self.num_found += 1
                    self.left_out.append(" ".join(str(error).split()))
        if (directory / RECORDS).is_dir() and self._is_new(directory / RECORDS):
            try:
                stages = stage_store(directory).completed()
            except ValueError as error:
                self.left_out.append(f"stages: {error}")
                return
            for name, record in stages:
                self.num_found += 1
                stage = StageSummary(name=name, summary=record.result, seconds=record.seconds)
                self._parts.append(_Part((*_place(directory), name), stage))

    def report(self, title: str, fields: dict[str, Any]) -> Report:
        """The report of everything found."""
        if self.left_out:
            self.note(f"Not shown in this report: {'; '.join(self.left_out)}")
        for note in self.notes:
            warnings.warn(note, stacklevel=3)
        notes = [*(note for report in self._reports for note in report.notes), *self.notes]
        commands = [command for report in self._reports for command in report.commands]
        given: dict[str, Any] = {
            "notes": (*fields.pop("notes", ()), *dict.fromkeys(notes)),
            "commands": tuple(dict.fromkeys((*commands, *fields.pop("commands", ())))),
        }
        if len(self._reports) == 1 and len(self._read) == 1:
            given |= {"subtitle": self._reports[0].subtitle, "seed": self._reports[0].seed}
        parts = self._named_parts()
        beside = {sections.kind_of(attachment.content) for attachment in self._attached}
        return Report(
            title=title,
            created_utc=utc_now(),
            environment=self._environment(),
            stages=tuple(part for part in parts if isinstance(part, StageSummary)),
            curves=tuple(part for part in parts if isinstance(part, Curve)),
            attached=tuple(self._attached),
            own_files={kind: _shown(file) for kind, (file, _) in self._own.items() if kind in beside},
            **{kind: result for kind, (_, result) in self._own.items()},
            **self._named_facts(),
            **(given | fields),
        )

    def _add(self, file: Path, content: Any) -> None:
        """Add a file once; `content` is its JSON, None for metrics. Raises ValueError for a misfit."""
        self.num_found += 1
        if not self._is_new(file):
            return
        kind = sections.kind_of(content)
        if file.name == FILE_NAME:
            curves = run_curves(Path(os.path.abspath(file.parent)), self.note)
            self._parts += [_Part(_place(file.parent), curve) for curve in curves]
            if not curves:
                self.left_out.append(f"{_shown(file)} (no losses yet)")
        elif kind == FACTS_KIND:
            self._take_facts(_place(file.parent), Facts.check(content, file))
        elif kind == REPORT_KIND:
            self._take_report(Report.check(content, file), file)
        elif kind in sections.KINDS:
            self._take_result(kind, sections.check(kind, content, str(file)), file, content)
        elif kind is not None:
            self.left_out.append(f"{_shown(file)} ({kind})")

    def _is_new(self, path: Path) -> bool:
        """Whether a file was not read before, under this or another name."""
        resolved = path.resolve()
        is_new = resolved not in self._read
        self._read.add(resolved)
        return is_new

    def _take_facts(self, place: Place, facts: Facts | Report) -> None:
        """Add fields a run has once; memory is added to that of its other engines."""
        known = self._facts.setdefault(place, {})
        for name in ("model", "other_models", "storage", "examples"):
            if value := getattr(facts, name, None):
                known.setdefault(name, value)
        if facts.memory_bytes:
            known["memory_bytes"] = facts.memory_bytes | known.get("memory_bytes", {})

    def _take_report(self, report: Report, file: Path) -> None:
        self._reports.append(report)
        place = _place(file.parent if file.name == REPORT_FILE else file.with_suffix(""))
        self._take_facts(place, report)
        # Reports of several runs were written once that have one name for all of them.
        times = Counter[tuple[str, ...]]()
        contents: list[Curve | StageSummary] = [*report.stages, *report.curves]
        for content in contents:
            key = (content.stage, content.label, content.quantity) if isinstance(content, Curve) else (content.name,)
            times[key] += 1
            name = key[0] if times[key] == 1 else f"{key[0]} ({times[key]})"
            self._parts.append(_Part((*place, name), content, report=file))
        for attachment in report.attached:
            if attachment not in self._attached:
                self._attached.append(attachment)
        for kind in OWN:
            if (result := getattr(report, kind)) is not None:
                of_report = Path(report.own_files.get(kind, str(file)))
                self._take_result(kind, result, of_report, result.model_dump(mode="json"), report.environment)

    def _take_result(
        self, kind: str, result: Any, file: Path, content: dict[str, Any], environment: Environment | None = None
    ) -> None:
        if kind not in OWN:
            self._attached.append(Attachment(name=_shown(file), content=content))
            return
        own_file, own = self._own.setdefault(kind, (file, result))
        # A report beside the file that it was made of has nothing new.
        if own is not result and not (own == result and own_file.resolve().parent == file.resolve().parent):
            if environment is not None and result.environment is None:
                content = content | {"environment": environment.model_dump(mode="json")}
            self._attached.append(Attachment(name=_shown(file), content=content))

    def _named_parts(self) -> list[Curve | StageSummary]:
        """Stages and curves, under names that tell the runs apart."""
        directories = [part for part in self._parts if part.report is None]
        on_disk = {part.place for part in directories}
        kept: list[tuple[Place, Curve | StageSummary]] = []
        for part in self._parts:
            place = part.place
            if part.report is not None and place in on_disk:
                # A report of the run as it is now says nothing new, one of the run as it was stands beside it.
                if any((place, part.content) == (other.place, other.content) for other in directories):
                    continue
                place = (*place[:-1], f"{place[-1]} ({part.report.name})")
            kept.append((place, part.content))
        places = list(dict.fromkeys(place for place, _ in kept))
        names = dict(zip(places, short_names(places), strict=True))
        return [
            content.model_copy(update={"stage" if isinstance(content, Curve) else "name": names[place]})
            for place, content in kept
        ]

    def _named_facts(self) -> dict[str, Any]:
        """Models, memory and texts; named by run if there are several."""
        facts = {place: known for place, known in self._facts.items() if known}
        if len(facts) < 2:
            return next(iter(facts.values()), {})
        names = dict(zip(facts, short_names(list(facts)), strict=True))
        models = [
            (names[place], model)
            for place, known in facts.items()
            for model in (known.get("model"), *known.get("other_models", ()))
            if model is not None
        ]
        if len({model for _, model in models}) == 1:
            models = [("", models[0][1])]
        named = [model.model_copy(update={"name": f"{run}: {model.name}"}) if run else model for run, model in models]
        return {
            "model": named[0] if named else None,
            "other_models": tuple(named[1:]),
            "storage": tuple(
                entry.model_copy(update={"place": f"{entry.place}, {names[place]}"})
                for place, known in facts.items()
                for entry in known.get("storage", ())
            ),
            "memory_bytes": {
                f"{names[place]}: {engine}": parts
                for place, known in facts.items()
                for engine, parts in known.get("memory_bytes", {}).items()
            },
            "examples": tuple(
                example.model_copy(update={"title": f"{names[place]}: {example.title}"})
                for place, known in facts.items()
                for example in known.get("examples", ())
            ),
        }

    def _environment(self) -> Environment:
        """Where the figures were measured, which may not be here."""
        own = [self._own[kind][1] for kind in ("timing", "acceptance", "quality") if kind in self._own]
        measured = [sections.environment_of(result) for result in own]
        measured += [report.environment for report in self._reports]
        for attachment in self._attached:
            kind = sections.kind_of(attachment.content)
            assert kind is not None
            measured.append(sections.environment_of(sections.check(kind, attachment.content, attachment.name)))
        return next((environment for environment in measured if environment is not None), describe_environment())


def _place(path: Path) -> Place:
    """The parts of the absolute path."""
    return tuple(map(printable, Path(os.path.abspath(path)).parts))


def _shown(file: Path) -> str:
    """A file's name on the page, relative to the working directory where possible."""
    resolved = file.resolve()
    return printable(str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(file))

"""Renders a report: `report.json` for machines, `report.html` for readers.

Every figure on the page comes from the `Report`, so that the files agree. Missing parts are left out.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from speedstack.eval.report.page import Headline, Page, Section, render
from speedstack.eval.report.sections import KINDS, Found, check, environment_of, kind_of, run, sections
from speedstack.eval.results.report import Report
from speedstack.eval.results.schema import Environment
from speedstack.support.files import write_atomically

MAX_HEADLINES = 8
GATHERING = "speedstack report"


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `directory`; returns both paths. Raises ValueError as `render_html`."""
    directory = Path(directory)
    html = render_html(report)
    json_path = report.save(directory / "report.json")
    return json_path, write_atomically(directory / "report.html", html)


def render_html(report: Report) -> str:
    """The page, deterministic. Raises ValueError for an attached result that does not fit its kind."""
    found = _found(report)
    shown = report_sections(report, found)
    machine = [report.environment.cpu_model, *report.environment.gpus]
    seed = "" if report.seed is None else f", seed {report.seed}"
    return render(
        Page(
            title=report.title,
            subtitle=report.subtitle,
            byline=f"{report.created_utc}{seed}, {', '.join(machine)}",
            headlines=_headlines(shown),
            notes=report.notes,
            sections=tuple(shown),
            environments=_environments(report, found),
            commands=report.commands,
        )
    )


def report_sections(report: Report, found: dict[str, list[Found[Any]]] | None = None) -> list[Section]:
    """All sections: what was done, measurements by kind, memory, curves, texts."""
    found = _found(report) if found is None else found
    shown = run.done(report)
    for kind, results in found.items():
        shown += sections(kind, results)
    shown += [*run.memory(report), *run.training(report), *run.examples(report)]
    # What names no file is of the run, and the run's command made it. A command that gathered files made nothing, and
    # which of several runs something is of is not known here.
    commands = [command for command in report.commands if not command.startswith(GATHERING)]
    return [section.made_by_run(commands[0] if len(commands) == 1 else None) for section in shown]


def headlines(report: Report) -> list[Headline]:
    """The main figures of a report."""
    return list(_headlines(report_sections(report)))


def utc_now() -> str:
    """The time for `Report.created_utc`."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _found(report: Report) -> dict[str, list[Found[Any]]]:
    """Results by kind, in the order of the page, the run's own first."""
    found: dict[str, list[Found[Any]]] = {kind: [] for kind in KINDS}
    for kind in ("quality", "acceptance", "timing"):
        if (own := getattr(report, kind)) is not None:
            found[kind].append(_with_command(report.own_files.get(kind, ""), own))
    for attachment in report.attached:
        kind_or_none = kind_of(attachment.content)
        if kind_or_none not in KINDS:
            raise ValueError(f"{attachment.name} is of kind {kind_or_none!r}, which a report has no section for")
        result = check(kind_or_none, attachment.content, attachment.name)
        found[kind_or_none].append(_with_command(attachment.name, result))
    return {kind: results for kind, results in found.items() if results}


def _with_command(name: str, result: Any) -> Found[Any]:
    environment = environment_of(result)
    return Found(name, result, None if environment is None else environment.command)


def _headlines(shown: Sequence[Section]) -> tuple[Headline, ...]:
    # Of several results of a kind, the first one's stands for them.
    by_label = {headline.label: headline for section in reversed(shown) for headline in reversed(section.headlines)}
    return tuple(reversed(by_label.values()))[:MAX_HEADLINES]


def _environments(report: Report, found: dict[str, list[Found[Any]]]) -> tuple[tuple[str, Environment], ...]:
    """The report's environment and all that differ from it, with the names of what was measured there."""
    names: dict[str, list[str]] = {}
    environments: dict[str, Environment] = {}

    def add(environment: Environment, name: str) -> None:
        plain = environment.model_copy(update={"command": None})
        key = plain.model_dump_json()
        environments[key] = plain
        names.setdefault(key, []).append(name)

    add(report.environment, "")
    for results in found.values():
        for one in results:
            if one.name and (environment := environment_of(one.result)) is not None:
                add(environment, one.name)
    if len(environments) == 1:
        return (("", report.environment),)
    return tuple(
        (", ".join(name for name in names[key] if name) or "the run", environment)
        for key, environment in environments.items()
    )

"""The parts of a page, and how they become HTML: sections of text, sortable tables and figures.

This file knows nothing of results, and the sections (`eval.report.sections`) know nothing of HTML. A page is one file
without outside resources. Its one script sorts tables; the content policy names it by hash and forbids everything
else, so that no text in a result can run or load anything.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from speedstack.eval.results.schema import Environment
from speedstack.eval.results.table import Table, format_bytes

TEMPLATES_DIR = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Headline:
    """A figure for the top of the page and for a terminal: value, meaning, context."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True)
class FigureBlock:
    """An SVG with its caption; `command` and `source` as in `Table`."""

    svg: str
    caption: str
    command: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Listing:
    """Text in a fixed font, ending in `marked`, which is highlighted."""

    title: str
    text: str
    marked: str


Block = Table | FigureBlock | Listing


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, then blocks."""

    title: str
    paragraphs: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    headlines: tuple[Headline, ...] = ()

    def made_by(self, command: str | None, source: str = "") -> "Section":
        """A copy with the command and the file on every table and figure."""
        return self._with_blocks(lambda block: replace(block, command=command, source=source))

    def made_by_run(self, command: str | None) -> "Section":
        """A copy with the command on every table and figure that has neither command nor file."""
        return self._with_blocks(
            lambda block: block if block.command or block.source else replace(block, command=command)
        )

    def of_run(self, name: str) -> "Section":
        """A copy with the name on its headlines, which are shown without the title."""
        if not name:
            return self
        marked = (
            replace(headline, detail=": ".join(filter(None, (name, headline.detail)))) for headline in self.headlines
        )
        return replace(self, headlines=tuple(marked))

    def _with_blocks(self, change: Callable[[Table | FigureBlock], Table | FigureBlock]) -> "Section":
        blocks = tuple(block if isinstance(block, Listing) else change(block) for block in self.blocks)
        return replace(self, blocks=blocks)


@dataclass(frozen=True)
class Page:
    """Everything to render. `environments` are pairs of what was measured, and where."""

    title: str
    subtitle: str
    byline: str
    headlines: tuple[Headline, ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    environments: tuple[tuple[str, Environment], ...]
    commands: tuple[str, ...]


def render(page: Page) -> str:
    """The page as HTML, deterministic."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, unique=_unique_ids)
    environment.tests.update(
        table=lambda block: isinstance(block, Table), figure=lambda block: isinstance(block, FigureBlock)
    )
    script = "\n" + (TEMPLATES_DIR / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(page=page, script=script, script_digest=f"sha256-{digest}")


def _unique_ids(svg: str, prefix: str) -> str:
    """The SVG with `prefix` before its ids, because titles may repeat on a page."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)

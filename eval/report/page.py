"""What a page is made of: sections of text, sortable tables and figures, and the one look that they share.

A kind of result is turned into sections by its module in `eval.report.sections`, which knows nothing of HTML; this
file knows nothing of results. The page is one file without outside resources: it can be mailed, printed, and opened in
ten years. Its one script sorts tables; its content policy names that script by hash and forbids everything else, so
that no text in a result can run or load anything.
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
    """One figure for the top of the page and for a terminal: value, what it is, what it stands against."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True)
class FigureBlock:
    """An SVG with the caption that says how to read it; `command` and `source` as a table's."""

    svg: str
    caption: str
    command: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Listing:
    """Text in a fixed font, of which `marked`, the end, is set off."""

    title: str
    text: str
    marked: str


Block = Table | FigureBlock | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: text first, then the blocks in their order."""

    title: str
    paragraphs: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    headlines: tuple[Headline, ...] = ()

    def made_by(self, command: str | None, source: str = "") -> "Section":
        """The section with the command and the file on every table and figure."""
        return self._with_blocks(lambda block: replace(block, command=command, source=source))

    def made_by_run(self, command: str | None) -> "Section":
        """The section with the command on every table and figure that has neither command nor file."""
        return self._with_blocks(
            lambda block: block if block.command or block.source else replace(block, command=command)
        )

    def of_run(self, name: str) -> "Section":
        """The section with the name of what it is of on its headlines, which stand without its title."""
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
    """Everything there is to render. `environments` are (what was measured there, where)."""

    title: str
    subtitle: str
    byline: str
    headlines: tuple[Headline, ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    environments: tuple[tuple[str, Environment], ...]
    commands: tuple[str, ...]


def render(page: Page) -> str:
    """The page as HTML. A function of its content alone: the same page gives the same bytes."""
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
    """The drawing with `prefix` before its ids: two of one title may stand on a page."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)

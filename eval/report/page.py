"""What a page is made of: sections of text, sortable tables and figures, and the one look that they share.

A kind of result is turned into sections by its module in `eval.report.sections`, which knows nothing of HTML; this
file knows nothing of results. The page is one file without outside resources: it can be mailed, printed, and opened in
ten years. Its one script sorts tables; its content policy names that script by hash and forbids everything else, so
that no text in a result can run or load anything.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from speedstack.eval.results.schema import Environment, Spread

TEMPLATES_DIR = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Headline:
    """One figure for the top of the page and for a terminal: value, what it is, what it stands against."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True)
class Column:
    """Heading of a column, its unit on a line below. Numbers stand right, words left."""

    title: str
    unit: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Cell:
    """What is read, and the number it is sorted by; `note` and `warning` are lines below it."""

    text: str
    value: float | None = None
    note: str = ""
    warning: str = ""


MISSING = Cell("\u2013")


@dataclass(frozen=True)
class Table:
    """Rows of a cell a column. `command` made what it shows, `source` is the file it was read from."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    command: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    def without_empty_columns(self) -> "Table":
        """The table without the columns of numbers in which no row has one."""
        kept = [
            index
            for index, column in enumerate(self.columns)
            if not column.is_number or any(row[index].value is not None for row in self.rows)
        ]
        columns = tuple(self.columns[index] for index in kept)
        return replace(self, columns=columns, rows=tuple(tuple(row[index] for index in kept) for row in self.rows))


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


def number(value: float | None, form: str = ".4g", scale: float = 1.0, suffix: str = "", note: str = "") -> Cell:
    """A cell of a number in Python's format language, times `scale`; a dash for None."""
    return MISSING if value is None else Cell(f"{scale * value:{form}}{suffix}", value, note=note)


def count(value: int | None) -> Cell:
    """A cell of a count."""
    return MISSING if value is None else Cell(f"{value:,}", value)


def number_and_error(
    value: float | None, stderr: float | None, form: str, scale: float = 1.0, suffix: str = ""
) -> Cell:
    """A number with its standard error: "1.80 ± 0.09"."""
    if value is None or stderr is None:
        return number(value, form, scale, suffix)
    return Cell(f"{scale * value:{form}} \u00b1 {scale * stderr:{form}}{suffix}", value)


def spread_cell(spread: Spread | None, scale: float = 1.0, digits: int = 0) -> Cell:
    """Median and quartiles, sorted by the median."""
    return MISSING if spread is None else Cell(format_spread(spread, scale, digits), spread.median)


def words(titles: Sequence[str]) -> tuple[Column, ...]:
    """Columns of words."""
    return tuple(Column(title, is_number=False) for title in titles)


def format_spread(spread: Spread, scale: float = 1.0, digits: int = 0) -> str:
    """Median and quartiles: "412 (405-418)"."""
    median, q1, q3 = (f"{scale * value:,.{digits}f}" for value in (spread.median, spread.q1, spread.q3))
    return f"{median} ({q1}\u2013{q3})"


def format_count(value: float) -> str:
    """A count with a suffix: 12.1 M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """Bytes in binary units: 4.0 MiB."""
    for size, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """A duration: 0.8 s, 21 s, 6 min 42 s."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_number(value: float, significant: int = 4) -> str:
    """A score with `significant` digits and without an exponent where it can do without."""
    return f"{value:.{significant}g}" if abs(value) < 10**significant else f"{value:,.0f}"


def plural(count: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def compact(content: Any) -> str:
    """Settings as one line: "method gptq, scale_rule mse"."""
    if isinstance(content, dict):
        return ", ".join(f"{key} {compact(value)}" for key, value in content.items())
    if isinstance(content, list | tuple):
        return " ".join(map(compact, content))
    return f"{content:g}" if isinstance(content, float) else str(content)

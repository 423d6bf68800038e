"""Tables of results. A column is declared once: heading, unit, field and format.

    Column("KL", "millinats a token", "kl_nats", ".3f", scale=1e3, error="kl_stderr_nats")

`Table.of` fills columns from records; a page, a terminal or a Markdown file shows the table.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from speedstack.eval.results.schema import Spread, Unavailable

# A dotted field name, or a function of the record.
Shown = str | Callable[[Any], Any]


@dataclass(frozen=True)
class Cell:
    """Text, and the number to sort by; `note` and `warning` are lines below."""

    text: str
    value: float | None = None
    note: str = ""
    warning: str = ""


MISSING = Cell("\u2013")


@dataclass(frozen=True)
class Column:
    """A heading with its unit; numbers align right, words left.

    `shows` is the value: a field by its dotted name (None if a part is), or a function of the record. `form` is a
    format spec or a function to text; numbers are multiplied by `scale` and followed by `suffix`. A `Spread` shows
    median and quartiles, a number its standard `error`, None a dash, and a `Cell` itself.
    """

    title: str
    unit: str = ""
    shows: Shown = ""
    form: str | Callable[[Any], str] = ""
    scale: float = 1.0
    suffix: str = ""
    error: Shown = ""
    error_form: str = ""
    note: Shown = ""
    warning: Shown = ""
    is_number: bool = True

    def cell(self, record: Any) -> Cell:
        """The cell of a record."""
        value, stderr = _value(record, self.shows), _value(record, self.error)
        if value is None:
            return MISSING
        if isinstance(value, Cell):
            return value
        note, warning = _value(record, self.note) or "", _value(record, self.warning) or ""
        if isinstance(value, Spread):
            median, q1, q3 = (self._text(one, self.form) for one in (value.median, value.q1, value.q3))
            return Cell(f"{median} ({q1}\u2013{q3})", value.median, note, warning)
        text = self._text(value, self.form)
        if stderr is not None:
            text += f" \u00b1 {self._text(stderr, self.error_form or self.form)}"
        is_sorted = self.is_number and isinstance(value, int | float)
        return Cell(text + self.suffix, value if is_sorted else None, note, warning)

    def _text(self, value: Any, form: str | Callable[[Any], str]) -> str:
        scaled = value if self.scale == 1 else self.scale * value
        return form(scaled) if callable(form) else f"{scaled:{form}}"


def _value(record: Any, shown: Shown) -> Any:
    if not shown:
        return None
    if callable(shown):
        return shown(record)
    for name in shown.split("."):
        record = None if record is None else getattr(record, name)
    return record


def words(title: str, shows: Shown, note: Shown = "", warning: Shown = "") -> Column:
    return Column(title, shows=shows, note=note, warning=warning, is_number=False)


def count(title: str, shows: Shown, unit: str = "") -> Column:
    return Column(title, unit, shows, ",")


def size(title: str, shows: Shown) -> Column:
    """Bytes in binary units."""
    return Column(title, shows=shows, form=format_bytes)


def percent(title: str, shows: Shown, form: str = ".2f") -> Column:
    return Column(title, shows=shows, form=form, scale=100, suffix="%")


def ratio(title: str, shows: Shown, unit: str = "", form: str = ".2f") -> Column:
    """A multiple, with a times sign."""
    return Column(title, unit, shows, form, suffix="\u00d7")


@dataclass(frozen=True)
class Table:
    """Rows with a cell per column; `command` and `source` say where the values came from."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    command: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    @classmethod
    def of(cls, columns: Sequence[Column], records: Iterable[Any], caption: str = "") -> Self:
        """A row per record."""
        rows = tuple(tuple(column.cell(record) for column in columns) for record in records)
        return cls(tuple(columns), rows, caption)

    def with_absent(self, absent: Sequence[Unavailable], how: str) -> Self:
        """Adds a row of dashes per absent entry, with its name and reason."""
        dashes = (MISSING,) * (len(self.columns) - 1)
        added = tuple((Cell(one.name, note=f"{how}: {one.reason}"), *dashes) for one in absent)
        return replace(self, rows=self.rows + added)

    def without_empty_columns(self) -> Self:
        """Drops number columns that are empty in every row."""
        kept = [
            index
            for index, column in enumerate(self.columns)
            if not column.is_number or any(row[index].text not in ("", MISSING.text) for row in self.rows)
        ]
        columns = tuple(self.columns[index] for index in kept)
        return replace(self, columns=columns, rows=tuple(tuple(row[index] for index in kept) for row in self.rows))

    def plain_rows(self) -> list[list[str]]:
        """Cell texts, empty for dashes."""
        return [["" if cell == MISSING else cell.text for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """Markdown without the caption."""
        rows = [[column.title for column in self.columns], *self.plain_rows()]
        escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
        titles, *below = (f"| {' | '.join(row)} |" for row in escaped)
        marks = "|".join("---:" if column.is_number else "---" for column in self.columns)
        return "\n".join([titles, f"|{marks}|", *below])

    def text(self) -> str:
        """Aligned text without the caption."""
        lines = [[column.title for column in self.columns], *self.plain_rows()]
        widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
        sides = [str.rjust if column.is_number else str.ljust for column in self.columns]
        return "\n".join(
            "  ".join(side(text, width) for side, text, width in zip(sides, line, widths, strict=True)).rstrip()
            for line in lines
        )


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
    """A number with `significant` digits, without an exponent if possible."""
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

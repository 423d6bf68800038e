"""Results of decoding: a race between ways of generating, and acceptance.

A call begins when the contestant gets a prompt's token ids. Tokens *arrive* when the host has them: singly, or several
at once after a round of speculation.

- First token: from the call to the first arrival.
- Prompt rate: prompt tokens over that time, which includes sampling.
- Decode rate: tokens after the first, over the time from the first arrival to the end of the call.
- Time of a token: the time since the previous arrival, divided by the tokens that arrived together; none for the first
  arrival. Its mean is the inverse of the decode rate, except for work after the last arrival, so that percentiles
  compare contestants with and without a drafter.
- Wait: the time between two arrivals. It is what a reader sees as stutter: a drafter may make waits longer.

Several sequences decoded at once are one call. Its first token is complete when every sequence has one; the decode rate
is of all sequences after that.

Percentiles are over the tokens (or waits) of a repeat, spreads over repeats.
"""

from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Environment, Record, Spread, Unavailable
from speedstack.eval.results.table import Column, Table, words

# Contestants whose ratios are what a race is about.
ENGINE, ENGINE_DRAFTER, TRANSFORMERS = "engine", "engine + drafter", "transformers"


class AcceptanceSet(Record):
    """Acceptance on one set of prompts.

    `acceptance_length` (tau) is committed tokens per round, bonus token included; `mean_of_responses` averages it over
    responses, as the DFlash paper does. `survival[i]` is the share of rounds that accepted all drafts up to position i
    + 1; the shares add up to tau - 1. (Files of 2026-11 have the share of rounds that drafted the position.)
    `rows_per_token` and `drafted_per_token` are per committed token; None in older files.
    """

    name: str
    num_prompts: int
    num_rounds: int
    num_committed: int
    acceptance_length: float
    mean_of_responses: float
    survival: tuple[float, ...]
    rows_per_token: float | None = None
    drafted_per_token: float | None = None


class AcceptanceResult(Document):
    """Acceptance of one drafter by one target.

    `block_size` is the most tokens a round commits; `strategy` has the fields of `DraftStrategy`.
    """

    kind: Literal["acceptance"] = "acceptance"
    block_size: int
    strategy: dict[str, Any] = Field(default={})
    temperature: float
    seed: int
    max_new_tokens: int
    overall: AcceptanceSet
    sets: tuple[AcceptanceSet, ...]
    environment: Environment | None = None


class Identity(Record):
    """Whether a contestant's tokens equal those of `reference`, and whether it promises that."""

    reference: str
    promised: bool
    num_identical: int
    num_prompts: int
    first_difference: str | None = None

    @property
    def is_broken(self) -> bool:
        """A promise was broken."""
        return self.promised and self.num_identical < self.num_prompts


class TokenTimes(Record):
    """Percentiles in milliseconds, with spreads over repeats."""

    p50: Spread
    p95: Spread
    p99: Spread


class ContestantTiming(Record):
    """One way of generating; the module defines what is timed. Values that do not apply, or are unknown, are None or
    empty.

    `tokens_per_second` is of the whole call, prefill included. `acceptance_length` and `survival` (see `AcceptanceSet`)
    are of contestants that speculate. `joules_per_token` is of whole calls; `usd_per_million_tokens` follows from
    `tokens_per_second`. `prepare_seconds` is until the first call: reading and arranging weights, compiling; shared
    work counts for each contestant.
    """

    name: str
    description: str
    prepare_seconds: float
    warmup_seconds: float
    decode_tokens_per_second: Spread
    tokens_per_second: Spread
    first_token_seconds: Spread
    prompt_tokens_per_second: Spread | None = None
    token_ms: TokenTimes | None = None
    wait_ms: TokenTimes | None = None
    acceptance_length: float | None = None
    survival: tuple[float, ...] = ()
    joules_per_token: Spread | None = None
    usd_per_million_tokens: float | None = None
    identity: Identity | None = None


class SetTiming(Record):
    """The race on one set of prompts, `batch_size` of them at once."""

    name: str
    source: str
    batch_size: int = 1
    num_prompt_tokens: tuple[int, ...]
    contestants: tuple[ContestantTiming, ...]


class TimingResult(Document):
    """A race on the same prompts, repeats interleaved.

    `contestants` is over all sets with the smallest batch size; `unavailable` could not run, on some set or at all.
    `energy` says how joules were counted, or why not. An interrupted race has fewer repeats, which spreads count.
    """

    kind: Literal["timing"] = "timing"
    device: str
    dtype: str
    num_threads: int
    num_prompts: int
    num_prompt_tokens: tuple[int, ...]
    num_new_tokens: int
    num_repeats: int
    contestants: tuple[ContestantTiming, ...]
    sets: tuple[SetTiming, ...] = ()
    unavailable: tuple[Unavailable, ...] = ()
    target: str | None = None
    drafter: str | None = None
    target_sha256: str | None = None
    drafter_sha256: str | None = None
    seed: int | None = None
    gpu_hour_usd: float | None = None
    energy: str | None = None
    notes: tuple[str, ...] = ()
    environment: Environment | None = None

    @property
    def batch_size(self) -> int:
        """Sequences at once in `contestants`."""
        return min((entry.batch_size for entry in self.sets), default=1)

    def contestant(self, name: str) -> ContestantTiming | None:
        """The entry named `name`, or None."""
        return next((entry for entry in self.contestants if entry.name == name), None)

    def speedup(self, name: str, over: str) -> float | None:
        """Ratio of median decode rates; None if either is missing or decoded nothing."""
        fast, slow = self.contestant(name), self.contestant(over)
        if fast is None or slow is None or not slow.decode_tokens_per_second.median:
            return None
        return fast.decode_tokens_per_second.median / slow.decode_tokens_per_second.median

    def rows(self, set_name: str | None = None) -> list[dict[str, str]]:
        """Table rows, heading -> cell, of one set or of all; empty columns are dropped. Raises ValueError for an
        unknown set.
        """
        entries = self.contestants
        if set_name is not None:
            found = next((entry for entry in self.sets if entry.name == set_name), None)
            if found is None:
                raise ValueError(f"no set {set_name!r}; there are {', '.join(entry.name for entry in self.sets)}")
            entries = found.contestants
        table = _table(entries)
        titles = [column.title for column in table.columns]
        return [dict(zip(titles, row, strict=True)) for row in table.plain_rows()]

    def table(self) -> str:
        """Markdown: all prompts, then each set if there are several, then a line per missing contestant."""
        parts = [_table(self.contestants).markdown()] if self.contestants else []
        if len(self.sets) > 1:
            parts += [
                f"{entry.name}:\n\n{_table(entry.contestants).markdown()}" for entry in self.sets if entry.contestants
            ]
        parts += [f"{entry.name}: did not run: {entry.reason}" for entry in self.unavailable]
        parts += [f"energy: {self.energy}"] if self.energy is not None else []
        return "\n\n".join([*parts, *self.notes]) + "\n"


def _number(value: float) -> str:
    """At least three significant digits, no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _decode_rate(entry: ContestantTiming) -> str:
    rate = entry.decode_tokens_per_second
    return f"{_number(rate.median)} ({_number(rate.q1)}-{_number(rate.q3)})"


def _same_text(entry: ContestantTiming) -> str | None:
    identity = entry.identity
    return None if identity is None else f"{identity.num_identical} of {identity.num_prompts}"


_COLUMNS = (
    words("contestant", "name"),
    Column("tokens/s", shows=_decode_rate),
    Column("whole call tokens/s", "", "tokens_per_second.median", _number),
    Column("first token ms", "", "first_token_seconds.median", _number, 1e3),
    Column("prompt tokens/s", "", "prompt_tokens_per_second.median", _number),
    Column("token ms p50", "", "token_ms.p50.median", _number),
    Column("p95", "", "token_ms.p95.median", _number),
    Column("p99", "", "token_ms.p99.median", _number),
    Column("wait ms p99", "", "wait_ms.p99.median", _number),
    Column("tau", "", "acceptance_length", ".2f"),
    Column("J/token", "", "joules_per_token.median", _number),
    Column("USD/M tokens", "", "usd_per_million_tokens", _number),
    Column("same text", shows=_same_text),
)


def _table(entries: tuple[ContestantTiming, ...]) -> Table:
    """Medians, and quartiles of the decode rate."""
    return Table.of(_COLUMNS, entries).without_empty_columns()

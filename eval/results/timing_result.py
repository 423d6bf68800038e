"""Result of a race between ways of generating: rates, times of single tokens, acceptance, energy, cost; and its table.

What is measured, precisely. A contestant's call begins when it gets the token ids of a prompt. Tokens *arrive* when the
host has them: one at a time, or several at once where a round of speculation commits them together, or a backend makes
several rounds before the host hears of them.

- First token: from the call to the first arrival.
- Prompt rate: the tokens of the prompt over that time, which also samples that token.
- Decode rate: the tokens after the first, over the time from the first arrival to the end of the call.
- Time of a token: its share of the wait for the arrival that brought it, which is the time since the arrival before
  divided by the tokens that came together. Tokens of the first arrival have none. The mean over tokens is the inverse
  of the decode rate, but for what a call does after its last arrival, so percentiles compare contestants with and
  without a drafter.
- Wait: the time between two arrivals, however many tokens the second brings. This is what a reader sees as stutter; a
  drafter makes tokens cheaper and may make waits longer.

Where several sequences are decoded at once, one call has all their prompts. Its first token is the one with which every
sequence has its first; what arrives later, of all sequences, over the time that is left is the decode rate.

Percentiles are taken over all tokens (or waits) of a repeat; the spread is over repeats.
"""

from collections.abc import Sequence
from typing import Literal

from speedstack.eval.results.schema import Document, Environment, Record, Spread, Unavailable

# Contestants whose ratios are what a race is about.
ENGINE, ENGINE_DRAFTER, TRANSFORMERS = "engine", "engine + drafter", "transformers"


class Identity(Record):
    """Whether a contestant's tokens are those of `reference`, and whether it promises so."""

    reference: str
    promised: bool
    num_identical: int
    num_prompts: int
    first_difference: str | None = None

    @property
    def is_broken(self) -> bool:
        """A promise was made and not kept."""
        return self.promised and self.num_identical < self.num_prompts


class TokenTimes(Record):
    """Percentiles of a time, in milliseconds; each with its spread over repeats."""

    p50: Spread
    p95: Spread
    p99: Spread


class ContestantTiming(Record):
    """One way of generating. Rates are tokens a second over all prompts of a repeat; the module says what is timed.

    `decode_tokens_per_second` counts the tokens after the first one and the time after it;
    `tokens_per_second` counts all of them over the whole call, prefill included;
    `prompt_tokens_per_second` is of the prompts.
    `acceptance_length` is tokens a decode round; `survival[i]` as in `eval.results.acceptance_result.AcceptanceSet`.
    Both are for contestants that speculate.
    `joules_per_token` is of whole calls; `usd_per_million_tokens` follows from `tokens_per_second`: decoding
    more sequences at once is cheaper.
    `prepare_seconds` is until the first call may come: weights read, arranged for the kernels, code compiled ahead.
    Contestants that share what was read count it each.
    None, or empty, where a contestant or a machine has no such figure, and in files older than the figure.
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
    """The race on one set of prompts, `batch_size` of them decoded at once. `source` is where they came from."""

    name: str
    source: str
    batch_size: int = 1
    num_prompt_tokens: tuple[int, ...]
    contestants: tuple[ContestantTiming, ...]


class TimingResult(Document):
    """A race: every contestant on the same prompts, repeats interleaved.

    `contestants` is over all sets with the smallest batch size; `unavailable` are those that could not run, on some set
    or at all. `energy` says how joules were counted, or why they were not. A file may be of a race that was
    interrupted: spreads say of how many repeats they are.
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
        """Sequences decoded at once where the figures over all sets were taken."""
        return min((entry.batch_size for entry in self.sets), default=1)

    def contestant(self, name: str) -> ContestantTiming | None:
        """The entry named `name`, None if it did not run."""
        return next((entry for entry in self.contestants if entry.name == name), None)

    def speedup(self, name: str, over: str) -> float | None:
        """Ratio of median decode rates, None if either did not run, or decoded nothing after its first tokens."""
        fast, slow = self.contestant(name), self.contestant(over)
        if fast is None or slow is None or not slow.decode_tokens_per_second.median:
            return None
        return fast.decode_tokens_per_second.median / slow.decode_tokens_per_second.median

    def rows(self, set_name: str | None = None) -> list[dict[str, str]]:
        """A table's rows, heading -> cell, of one set of prompts or of all; columns without any figure are left out.

        Raises ValueError for a set that is not there.
        """
        entries = self.contestants
        if set_name is not None:
            found = next((entry for entry in self.sets if entry.name == set_name), None)
            if found is None:
                raise ValueError(f"no set {set_name!r}; there are {', '.join(entry.name for entry in self.sets)}")
            entries = found.contestants
        rows = [_cells(entry) for entry in entries]
        empty = {heading for heading in (rows[0] if rows else ()) if not any(row[heading] for row in rows)}
        return [{heading: cell for heading, cell in row.items() if heading not in empty} for row in rows]

    def table(self) -> str:
        """Markdown: all prompts, then each set where there are several, and a line for everything that is not there."""
        parts = [_markdown(self.rows())]
        if len(self.sets) > 1:
            parts += [
                f"{entry.name}:\n\n{_markdown(self.rows(entry.name))}" for entry in self.sets if entry.contestants
            ]
        lines = [f"{entry.name}: did not run: {entry.reason}" for entry in self.unavailable]
        lines += [f"energy: {self.energy}"] if self.energy is not None else []
        lines += self.notes
        return "\n\n".join([part for part in parts if part] + lines) + "\n"


def _cells(entry: ContestantTiming) -> dict[str, str]:
    """The figures of a contestant as text; medians, and quartiles of the rate."""
    prompt, token, wait, identity = entry.prompt_tokens_per_second, entry.token_ms, entry.wait_ms, entry.identity
    return {
        "contestant": entry.name,
        "tokens/s": _with_quartiles(entry.decode_tokens_per_second),
        "whole call tokens/s": _number(entry.tokens_per_second.median),
        "first token ms": _number(1e3 * entry.first_token_seconds.median),
        "prompt tokens/s": "" if prompt is None else _number(prompt.median),
        "token ms p50": "" if token is None else _number(token.p50.median),
        "p95": "" if token is None else _number(token.p95.median),
        "p99": "" if token is None else _number(token.p99.median),
        "wait ms p99": "" if wait is None else _number(wait.p99.median),
        "tau": "" if entry.acceptance_length is None else f"{entry.acceptance_length:.2f}",
        "J/token": "" if entry.joules_per_token is None else _number(entry.joules_per_token.median),
        "USD/M tokens": "" if entry.usd_per_million_tokens is None else _number(entry.usd_per_million_tokens),
        "same text": "" if identity is None else f"{identity.num_identical} of {identity.num_prompts}",
    }


def _with_quartiles(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.q1)}-{_number(spread.q3)})"


def _number(value: float) -> str:
    """Three significant digits at least, and no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

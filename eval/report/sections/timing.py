"""A race: decode rates of the engine and its peers on the same prompts."""

from collections.abc import Sequence

from speedstack.eval.report import plots
from speedstack.eval.report.page import (
    MISSING,
    Block,
    Cell,
    Column,
    FigureBlock,
    Headline,
    Section,
    Table,
    number,
    plural,
)
from speedstack.eval.report.page import spread_cell as spread
from speedstack.eval.report.sections import Found, each
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.results.speed import ENGINE, ENGINE_DRAFTER, TRANSFORMERS, ContestantTiming, Identity, TimingResult

DOCUMENT = TimingResult


def sections(found: Sequence[Found[TimingResult]]) -> list[Section]:
    """A section a result."""
    return each("Speed", found, _section)


def _section(timing: TimingResult, title: str) -> Section:
    lengths = sorted({min(timing.num_prompt_tokens, default=0), max(timing.num_prompt_tokens, default=0)})
    blocks: list[Block] = [_table(timing.contestants, "", timing.unavailable)]
    if timing.contestants:
        caption = f"Tokens a second while decoding {plural(timing.batch_size, 'sequence')}; higher is better."
        blocks.append(FigureBlock(plots.tokens_per_second(timing), caption))
    if any(entry.token_ms is not None for entry in timing.contestants):
        blocks.append(_token_times(timing))
    speculating = {entry.name: entry.survival for entry in timing.contestants if entry.survival}
    if speculating:
        caption = "Acceptance by position of those that speculate, over the prompts that were timed."
        blocks.append(FigureBlock(plots.survival_curves("Acceptance while timed", speculating), caption))
    if len(timing.sets) > 1:
        blocks += [
            _table(
                entry.contestants,
                f"Prompts {entry.name}, {plural(len(entry.num_prompt_tokens), 'prompt')}, "
                f"{plural(entry.batch_size, 'sequence')} at a time.",
            )
            for entry in timing.sets
            if entry.contestants
        ]
    at_once = f"{plural(timing.batch_size, 'sequence')} at a time"
    paragraphs = [
        f"{at_once}, {plural(timing.num_prompts, 'prompt')} of {' to '.join(map(str, lengths))} tokens, "
        f"{timing.num_new_tokens} new tokens each, greedy, {timing.dtype} on {timing.device} with "
        f"{plural(timing.num_threads, 'thread')}; {plural(timing.num_repeats, 'repeat')}, interleaved after a warm-up. "
        "Medians, with quartiles in brackets."
    ]
    if timing.gpu_hour_usd is not None:
        paragraphs.append(f"Cost at {timing.gpu_hour_usd:g} USD an hour, for {at_once}.")
    if timing.energy is not None:
        paragraphs.append(f"Energy: {timing.energy}.")
    return Section(title, (*paragraphs, *timing.notes), tuple(blocks), _headlines(timing))


def _table(entries: Sequence[ContestantTiming], caption: str = "", unavailable: Sequence[Unavailable] = ()) -> Table:
    columns = (
        Column("contestant", is_number=False),
        Column("decode", "tokens/s"),
        Column("whole call", "tokens/s"),
        Column("first token", "ms"),
        Column("prompt", "tokens/s"),
        Column("token, p50", "ms"),
        Column("p95", "ms"),
        Column("p99", "ms"),
        Column("wait, p99", "ms"),
        Column("\u03c4"),
        Column("energy", "J a token"),
        Column("cost", "USD a million tokens"),
        Column("prepare + warm-up", "s"),
        Column("same tokens?", is_number=False),
    )
    rows = [_row(entry) for entry in entries]
    for absent in unavailable:
        rows.append((Cell(absent.name, note=f"did not run: {absent.reason}"), *[MISSING] * (len(columns) - 1)))
    return Table(columns, tuple(rows), caption).without_empty_columns()


def _row(entry: ContestantTiming) -> tuple[Cell, ...]:
    token, wait = entry.token_ms, entry.wait_ms
    return (
        Cell(entry.name, note=entry.description),
        spread(entry.decode_tokens_per_second),
        spread(entry.tokens_per_second),
        spread(entry.first_token_seconds, 1000, 1),
        spread(entry.prompt_tokens_per_second),
        *(number(None if token is None else getattr(token, name).median, ".3g") for name in ("p50", "p95", "p99")),
        number(None if wait is None else wait.p99.median, ".3g"),
        number(entry.acceptance_length, ".2f"),
        MISSING if entry.joules_per_token is None else number(entry.joules_per_token.median, ".3g"),
        number(entry.usd_per_million_tokens, ".3g"),
        Cell(f"{entry.prepare_seconds:.1f} + {entry.warmup_seconds:.1f}", entry.prepare_seconds + entry.warmup_seconds),
        _same_tokens(entry.identity),
    )


def _same_tokens(identity: Identity | None) -> Cell:
    if identity is None:
        return MISSING
    text = f"{identity.num_identical} of {identity.num_prompts} as \u201c{identity.reference}\u201d"
    if identity.is_broken:
        return Cell(text, warning=f"promised, but {identity.first_difference}")
    return Cell(text, note=f"{identity.first_difference} (rounding; not promised)" if identity.first_difference else "")


def _token_times(timing: TimingResult) -> FigureBlock:
    known = [entry for entry in timing.contestants if entry.token_ms is not None]
    series = {
        name: [
            (percentile.median, percentile.q1, percentile.q3)
            for entry in known
            if entry.token_ms is not None
            for percentile in (getattr(entry.token_ms, name),)
        ]
        for name in ("p50", "p95", "p99")
    }
    label = "time of a token (ms, log scale; whiskers: quartiles of the repeats)"
    svg = plots.dots("Time of a token", [entry.name for entry in known], series, label, log=True)
    return FigureBlock(svg, "Percentiles over tokens: a token's share of the wait for those that came with it.")


def _headlines(timing: TimingResult) -> tuple[Headline, ...]:
    found = []
    for fast, slow, label in (
        (ENGINE_DRAFTER, ENGINE, "decoding with the drafter against without"),
        (ENGINE, TRANSFORMERS, "decoding against transformers, both without a drafter"),
    ):
        ratio, entries = timing.speedup(fast, slow), (timing.contestant(fast), timing.contestant(slow))
        if ratio is not None:
            rates = [entry.decode_tokens_per_second.median for entry in entries if entry is not None]
            found.append(Headline(f"{ratio:.2f}\u00d7", label, f"{rates[0]:.0f} and {rates[1]:.0f} tokens/s (medians)"))
    return tuple(found)

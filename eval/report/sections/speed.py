"""Sections of decode speed: a race, acceptance, and ways to speculate."""

from collections.abc import Sequence

from speedstack.eval.report import plots
from speedstack.eval.report.page import Block, FigureBlock, Headline, Section
from speedstack.eval.report.tables import ACCEPTANCE, SERVING, TIMING
from speedstack.eval.results.microbench import ServingBench, ServingRow
from speedstack.eval.results.speed import ENGINE, ENGINE_DRAFTER, TRANSFORMERS, AcceptanceResult, TimingResult
from speedstack.eval.results.table import Table, plural

NO_DRAFTER = "no drafter"
PERCENTILES = ("p50", "p95", "p99")


def timing(result: TimingResult, title: str) -> Section:
    """Decode rates of the engine and its peers."""
    everything = Table.of(TIMING, result.contestants).with_absent(result.unavailable, "did not run")
    blocks: list[Block] = [everything.without_empty_columns()]
    if result.contestants:
        caption = f"Tokens a second while decoding {plural(result.batch_size, 'sequence')}; higher is better."
        blocks.append(FigureBlock(plots.tokens_per_second(result), caption))
    if any(entry.token_ms is not None for entry in result.contestants):
        blocks.append(_token_times(result))
    speculating = {entry.name: entry.survival for entry in result.contestants if entry.survival}
    if speculating:
        caption = "Acceptance by position of those that speculate, over the prompts that were timed."
        blocks.append(FigureBlock(plots.survival_curves("Acceptance while timed", speculating), caption))
    for entry in result.sets if len(result.sets) > 1 else ():
        if entry.contestants:
            caption = (
                f"Prompts {entry.name}, {plural(len(entry.num_prompt_tokens), 'prompt')}, "
                f"{plural(entry.batch_size, 'sequence')} at a time."
            )
            blocks.append(Table.of(TIMING, entry.contestants, caption).without_empty_columns())
    return Section(title, (*_timing_text(result), *result.notes), tuple(blocks), _timing_headlines(result))


def _timing_text(result: TimingResult) -> list[str]:
    lengths = sorted({min(result.num_prompt_tokens, default=0), max(result.num_prompt_tokens, default=0)})
    at_once = f"{plural(result.batch_size, 'sequence')} at a time"
    paragraphs = [
        f"{at_once}, {plural(result.num_prompts, 'prompt')} of {' to '.join(map(str, lengths))} tokens, "
        f"{result.num_new_tokens} new tokens each, greedy, {result.dtype} on {result.device} with "
        f"{plural(result.num_threads, 'thread')}; {plural(result.num_repeats, 'repeat')}, interleaved after a warm-up. "
        "Medians, with quartiles in brackets."
    ]
    if result.gpu_hour_usd is not None:
        paragraphs.append(f"Cost at {result.gpu_hour_usd:g} USD an hour, for {at_once}.")
    if result.energy is not None:
        paragraphs.append(f"Energy: {result.energy}.")
    return paragraphs


def _token_times(result: TimingResult) -> FigureBlock:
    known = [(entry.name, entry.token_ms) for entry in result.contestants if entry.token_ms is not None]
    spreads = {name: [getattr(times, name) for _, times in known] for name in PERCENTILES}
    series = {name: [(one.median, one.q1, one.q3) for one in found] for name, found in spreads.items()}
    label = "time of a token (ms, log scale; whiskers: quartiles of the repeats)"
    svg = plots.dots("Time of a token", [name for name, _ in known], series, label, log=True)
    return FigureBlock(svg, "Percentiles over tokens: a token's share of the wait for those that came with it.")


def _timing_headlines(result: TimingResult) -> tuple[Headline, ...]:
    found = []
    for fast, slow, label in (
        (ENGINE_DRAFTER, ENGINE, "decoding with the drafter against without"),
        (ENGINE, TRANSFORMERS, "decoding against transformers, both without a drafter"),
    ):
        ratio, entries = result.speedup(fast, slow), (result.contestant(fast), result.contestant(slow))
        if ratio is not None:
            rates = [entry.decode_tokens_per_second.median for entry in entries if entry is not None]
            found.append(Headline(f"{ratio:.2f}\u00d7", label, f"{rates[0]:.0f} and {rates[1]:.0f} tokens/s (medians)"))
    return tuple(found)


def acceptance(result: AcceptanceResult, title: str) -> Section:
    """Acceptance by prompt set and by position in the block."""
    caption = "How far into a block the target agrees. The sum of a curve's points, plus 1, is about its \u03c4."
    sampling = "greedy" if result.temperature == 0 else f"temperature {result.temperature:g}"
    text = (
        f"Each round the drafter proposes up to {result.block_size - 1} tokens and the target checks them in "
        "one pass. What the target would not have written itself is dropped, so the text is the same with the "
        "drafter and without."
    )
    headline = Headline(
        f"{result.overall.acceptance_length:.2f}",
        f"tokens a pass of the target (\u03c4), of {result.block_size}",
        f"{result.overall.num_prompts} held-out prompts, {result.max_new_tokens} new tokens each, {sampling}",
    )
    blocks = (
        Table.of(ACCEPTANCE, (result.overall, *result.sets)).without_empty_columns(),
        FigureBlock(plots.acceptance_by_position(result), caption),
    )
    return Section(title, (text,), blocks, (headline,))


def serving(result: ServingBench, title: str) -> Section:
    """Ways to speculate with one target and drafter."""
    table = Table.of(SERVING, result.rows, "Medians of the repeats, with quartiles in brackets.")
    blocks: list[Block] = [table.without_empty_columns()]
    timed = [row for row in result.rows if row.decode_tokens_per_second is not None]
    if timed:
        blocks.append(_rates(timed))
    blocks.append(_lengths(result.rows))
    text = (
        f"{plural(result.num_prompts, 'prompt')}, {result.num_new_tokens} new tokens each, one sequence at a time. "
        "Every row's text is that of the row without a drafter at its temperature."
    )
    if any(row.backend == "reference" for row in result.rows):
        text += " The reference backend is built to be checked and not to be fast."
    return Section(title, (text,), tuple(blocks), _serving_headlines(timed))


def _serving_headlines(timed: Sequence[ServingRow]) -> tuple[Headline, ...]:
    plain = next((row for row in timed if row.name == NO_DRAFTER and row.temperature == 0), None)
    if plain is None or plain.decode_tokens_per_second is None:
        return ()
    rates = {
        row.name: row.decode_tokens_per_second.median
        for row in timed
        if row.decode_tokens_per_second is not None and row.temperature == 0 and row.backend == plain.backend
    }
    best = max(rates, key=lambda name: rates[name])
    base = plain.decode_tokens_per_second.median
    return (
        Headline(
            f"{rates[best] / base:.2f}\u00d7",
            f"decoding by {best}, greedy, against no drafter",
            f"{rates[best]:,.0f} and {base:,.0f} tokens/s (medians)",
        ),
    )


def _rates(timed: Sequence[ServingRow]) -> FigureBlock:
    rates = [row.decode_tokens_per_second for row in timed if row.decode_tokens_per_second is not None]
    svg = plots.bars(
        "Decode rate by way to speculate",
        [_label(row, timed) for row in timed],
        [rate.median for rate in rates],
        "decode rate (tokens/s; whiskers: quartiles)",
        ([rate.median - rate.q1 for rate in rates], [rate.q3 - rate.median for rate in rates]),
        "{:,.0f}",
    )
    return FigureBlock(svg, "Tokens a second while decoding one sequence; higher is better.")


def _lengths(rows: Sequence[ServingRow]) -> FigureBlock:
    drafted = [row for row in rows if row.proposer != "none"]
    svg = plots.bars(
        "Tokens a round by way to speculate",
        [_label(row, drafted) for row in drafted],
        [row.acceptance.acceptance_length for row in drafted],
        "\u03c4, tokens a round of the target",
        value_format="{:.2f}",
    )
    return FigureBlock(svg, "Tokens committed a round, the target's own included; without a drafter it is 1.")


def _label(row: ServingRow, rows: Sequence[ServingRow]) -> str:
    """The name of a way, with its temperature and backend if needed."""
    label = row.name if row.temperature == 0 else f"{row.name}, T\u00a0=\u00a0{row.temperature:g}"
    same = [other for other in rows if (other.name, other.temperature) == (row.name, row.temperature)]
    return label if len(same) == 1 else f"{label} ({row.backend})"

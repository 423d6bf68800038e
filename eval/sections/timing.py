"""A race: decode rates of the engine and its peers on the same prompts."""

from collections.abc import Sequence

from speedstack.eval import plots
from speedstack.eval.page import MISSING, Block, Cell, Column, FigureBlock, Headline, Section, Table, number, plural
from speedstack.eval.page import spread_cell as spread
from speedstack.eval.peers import ENGINE, ENGINE_DRAFTER, TRANSFORMERS
from speedstack.eval.results import ContestantTiming, TimingResult
from speedstack.eval.sections import Found, each

DOCUMENT = TimingResult
COLUMNS = (
    Column("contestant", is_number=False),
    Column("decode", "tokens/s"),
    Column("whole call", "tokens/s"),
    Column("first token", "ms"),
    Column("\u03c4"),
    Column("prepare + warm-up", "s"),
    Column("same tokens?", is_number=False),
)


def sections(found: Sequence[Found[TimingResult]]) -> list[Section]:
    """A section a result."""
    return each("Speed", found, _section)


def _section(timing: TimingResult, title: str) -> Section:
    lengths = sorted({min(timing.num_prompt_tokens), max(timing.num_prompt_tokens)})
    rows = [_row(entry) for entry in timing.contestants]
    for absent in timing.unavailable:
        rows.append((Cell(absent.name, note=f"did not run: {absent.reason}"), *[MISSING] * (len(COLUMNS) - 1)))
    blocks: list[Block] = [Table(COLUMNS, tuple(rows))]
    if timing.contestants:
        caption = "Tokens a second while decoding one sequence; higher is better."
        blocks.append(FigureBlock(plots.tokens_per_second(timing), caption))
    return Section(
        title,
        (
            f"One sequence at a time, {plural(timing.num_prompts, 'prompt')} of {' to '.join(map(str, lengths))} "
            f"tokens, {timing.num_new_tokens} new tokens each, greedy, {timing.dtype} on {timing.device} with "
            f"{plural(timing.num_threads, 'thread')}; {plural(timing.num_repeats, 'repeat')}, interleaved in one "
            "process after a warm-up. Medians, with quartiles in brackets.",
        ),
        tuple(blocks),
        _headlines(timing),
    )


def _row(entry: ContestantTiming) -> tuple[Cell, ...]:
    identity = entry.identity
    same = MISSING
    if identity is not None:
        text = f"{identity.num_identical} of {identity.num_prompts} as \u201c{identity.reference}\u201d"
        if identity.is_broken:
            same = Cell(text, warning=f"promised, but {identity.first_difference}")
        else:
            rounding = f"{identity.first_difference} (rounding; not promised)" if identity.first_difference else ""
            same = Cell(text, note=rounding)
    return (
        Cell(entry.name, note=entry.description),
        spread(entry.decode_tokens_per_second),
        spread(entry.tokens_per_second),
        spread(entry.first_token_seconds, 1000, 1),
        number(entry.acceptance_length, ".2f"),
        Cell(f"{entry.prepare_seconds:.1f} + {entry.warmup_seconds:.1f}", entry.prepare_seconds + entry.warmup_seconds),
        same,
    )


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

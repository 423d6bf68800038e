"""Ways to speculate: tokens per round, rows verified, tokens per second.

    python -m speedstack.eval.microbench.serving --target T --drafter D --prompts runs/demo/corpus --out results/x.json

Prompts are the held-out part of a prepared corpus, or those of a file. Every row decodes the same prompts, one sequence
at a time, past end-of-text tokens; a text that differs from the row without a drafter at its temperature ends the run.
Counts are over all prompts. The first few are timed, rows in turns in a seeded order.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.data.prompts import HELDOUT, PromptLoader
from speedstack.eval.microbench.harness import in_turns
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import ServingBench, ServingRow
from speedstack.eval.results.table import Column, Table, words
from speedstack.eval.speed.acceptance import summarize
from speedstack.eval.speed.harness import spread
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine, Generation
from speedstack.runtime.engine import DEFAULT_MAX_LENGTH
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.rounds.speculation import NGRAM, DraftStrategy
from speedstack.support.command import module_command, module_parser, show_result

Proposer = Literal["none", "drafter", "ngram"]


@dataclass(frozen=True)
class Way:
    """One row: proposer, strategy, temperature."""

    name: str
    proposer: Proposer
    strategy: DraftStrategy = DraftStrategy()  # noqa: RUF009 - frozen
    temperature: float = 0.0


def ways_of(num_proposals: int) -> list[Way]:
    """The rows: chains of all lengths, adaptive, prompt lookup; greedy and at temperature 1."""
    ways = [Way("no drafter", "none")]
    ways += [Way(f"chain of {count}", "drafter", DraftStrategy(count)) for count in range(1, num_proposals + 1)]
    ways += [Way("adaptive", "drafter", DraftStrategy("adaptive"))]
    ways += [
        Way("look-up of 7", "ngram", DraftStrategy(7)),
        Way("look-up, adaptive", "ngram", DraftStrategy("adaptive")),
    ]
    sampled = [
        Way("no drafter", "none"),
        Way("chain, argmax", "drafter", DraftStrategy()),
        Way("chain, shared noise", "drafter", DraftStrategy(noise="shared")),
        Way("adaptive, argmax", "drafter", DraftStrategy("adaptive")),
        Way("adaptive, shared noise", "drafter", DraftStrategy("adaptive", noise="shared")),
        Way("look-up, adaptive", "ngram", DraftStrategy("adaptive")),
    ]
    return ways + [replace(way, temperature=1.0) for way in sampled]


class Server:
    """One engine; `run` sets the proposer and strategy of a row."""

    def __init__(self, target: Path, drafter: DFlashDraftModel, max_length: int | None, device: str = "auto") -> None:
        self._engine = Engine.from_pretrained(target, device=device, max_length=max_length, max_batch_size=1)
        self._drafter = drafter
        self._proposer: Proposer = "none"

    @property
    def backend_name(self) -> str:
        return self._engine.backend_name

    def run(self, way: Way, prompt: list[int], num_new_tokens: int, seed: int) -> Generation:
        if self._proposer != way.proposer:
            self._engine.set_drafter(None)
            if way.proposer != "none":
                self._engine.set_drafter(self._drafter if way.proposer == "drafter" else NGRAM)
            self._proposer = way.proposer
        self._engine.set_strategy(way.strategy)
        found: Generation = self._engine.generate(
            prompt, num_new_tokens, temperature=way.temperature, seed=seed, ignore_eos=True
        )
        return found


def measure_serving(
    server: Server,
    ways: Sequence[Way],
    prompt_sets: Mapping[str, Sequence[list[int]]],
    num_new_tokens: int,
    num_repeats: int,
    num_timed_prompts: int,
    seed: int = 0,
    progress: bool = True,
) -> list[ServingRow]:
    """Counts, then times. Raises ValueError if speculation changes a text."""
    if num_repeats < 0 or num_timed_prompts < 1:
        raise ValueError("a serving bench needs at least one prompt to time")
    prompts = [prompt for group in prompt_sets.values() for prompt in group]
    timed = prompts[:num_timed_prompts]
    total = len(ways) * (len(prompts) + num_repeats * len(timed))
    texts: dict[float, list[list[int]]] = {}
    counted: list[dict[str, list[Generation]]] = []
    with tqdm(total=total, desc="serving", disable=not progress, dynamic_ncols=True) as bar:
        for way in ways:
            found: dict[str, list[Generation]] = {}
            for name, group in prompt_sets.items():
                found[name] = []
                for prompt in group:
                    found[name].append(server.run(way, prompt, num_new_tokens, seed))
                    bar.update()
            tokens = [generation.tokens for group in found.values() for generation in group]
            if texts.setdefault(way.temperature, tokens) != tokens:
                raise ValueError(f"{way.name!r} changed a text: that is a fault, do not use it")
            counted.append(found)

        def rate(index: int, turn: int) -> float:
            """Tokens per second of the timed prompts."""
            stats = []
            for prompt in timed:
                stats.append(server.run(ways[index], prompt, num_new_tokens, seed).stats)
                bar.update()
            return sum(one.num_round_tokens for one in stats) / sum(one.decode_seconds for one in stats)

        rates = in_turns(range(len(ways)), rate, num_repeats, num_warmups=0, orders=random.Random(seed))
    return [
        ServingRow(
            name=way.name,
            proposer=way.proposer,
            strategy=asdict(way.strategy),
            backend=server.backend_name,
            temperature=way.temperature,
            acceptance=summarize("all prompts", [one for group in found.values() for one in group]),
            sets=tuple(summarize(name, group) for name, group in found.items()),
            num_timed_prompts=len(timed),
            decode_tokens_per_second=spread(rates[index]) if rates[index] else None,
        )
        for index, (way, found) in enumerate(zip(ways, counted, strict=True))
    ]


def prompt_sets_of(
    source: Path, target: Path, num_prompts: int, num_tokens: int, max_tokens: int
) -> dict[str, Sequence[list[int]]]:
    """Prompts by set name: `num_tokens` each from a corpus, or those of a file with at most `max_tokens`.

    Raises ValueError for anything else.
    """
    tokenizer = load_tokenizer(target)
    loader = PromptLoader(tokenizer, max_tokens, num_prompts, corpus=source, num_heldout_tokens=num_tokens)
    return {entry.name: entry.prompts for entry in loader.load([HELDOUT if source.is_dir() else str(source)])}


COLUMNS = (
    words("backend", "backend"),
    Column("T", "", "temperature", ".0f"),
    words("way", "name"),
    Column("tau", "", "acceptance.acceptance_length", ".2f"),
    Column("rows/token", "", "acceptance.rows_per_token", ".2f"),
    Column("drafted/token", "", "acceptance.drafted_per_token", ".2f"),
    Column("tokens/s", "", "decode_tokens_per_second.median", ".0f"),
)


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print, write JSON."""
    parser = module_parser(__spec__, __doc__)
    parser.add_argument("--target", type=Path, required=True, help="model directory")
    parser.add_argument("--drafter", type=Path, required=True, help="drafter directory")
    parser.add_argument("--prompts", type=Path, required=True, help="prepared corpus, or JSONL with the field prompt")
    parser.add_argument("--num-prompts", type=int, default=16, help="prompts of each set (default: %(default)s)")
    parser.add_argument("--num-prompt-tokens", type=int, default=64, help="of a corpus' prompts (default: %(default)s)")
    parser.add_argument("--num-new-tokens", type=int, default=128, help="a prompt (default: %(default)s)")
    parser.add_argument("--num-repeats", type=int, default=5, help="timed; 0 counts only (default: %(default)s)")
    parser.add_argument("--num-timed-prompts", type=int, default=4, help="of a repeat (default: %(default)s)")
    parser.add_argument("--max-length", type=int, help="positions of a sequence's buffers")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the order (default: %(default)s)")
    options = parser.parse_args(arguments)
    result = bench(options)
    show_result(result, Table.of(COLUMNS, result.rows).text(), options.out)


def bench(options: argparse.Namespace) -> ServingBench:
    """The whole measurement. Raises ValueError as its parts do."""
    window = spec_from_config(read_config(options.target)[0]).max_position_embeddings
    max_length = options.max_length or min(window, DEFAULT_MAX_LENGTH)
    prompt_sets = prompt_sets_of(
        options.prompts,
        options.target,
        options.num_prompts,
        options.num_prompt_tokens,
        max_length - options.num_new_tokens,
    )
    drafter = load_drafter(options.drafter)
    ways = ways_of(drafter.config.num_proposals)
    rows = measure_serving(
        Server(options.target, drafter, options.max_length, options.device),
        ways,
        prompt_sets,
        options.num_new_tokens,
        options.num_repeats,
        options.num_timed_prompts,
        options.seed,
    )
    return ServingBench(
        target=str(options.target),
        drafter=str(options.drafter),
        prompts=str(options.prompts),
        num_prompts=sum(len(group) for group in prompt_sets.values()),
        num_new_tokens=options.num_new_tokens,
        num_repeats=options.num_repeats,
        seed=options.seed,
        rows=tuple(rows),
        environment=describe_environment(),
    )


if __name__ == "__main__":
    sys.exit(main())

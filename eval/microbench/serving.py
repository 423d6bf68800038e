"""What each way of speculating is worth: tokens a round, rows verified, tokens a second.

    python -m speedstack.eval.microbench.serving --target T --drafter D --prompts runs/demo/corpus --out results/x.json

Prompts are the held-out part of a prepared corpus, or those of a file, as `bench` reads it. Every row
decodes the same prompts, one sequence at a time, past end-of-text tokens; its text is compared with that of the row
without a drafter at the same temperature on the same backend, and a difference ends the run. Counts are of all prompts;
repeats of the first few are timed with the rows interleaved, in a seeded order, and medians are reported.

Trees need the `reference` backend, which is built to be checked and not to be fast: its rows stand apart, with a
chain and no drafter beside them, and decode fewer of the prompts. A tree's speed is given over that chain's: what a row
costs beside a step, and with it whether a tree pays, is another matter in compiled kernels.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.data.prompts import HELDOUT, PromptLoader
from speedstack.eval.microbench.harness import finish, in_turns, parser
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import ServingBench, ServingRow
from speedstack.eval.results.schema import Spread
from speedstack.eval.results.table import Column, Table, ratio, words
from speedstack.eval.speed.acceptance import summarize
from speedstack.eval.speed.harness import spread
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine, Generation
from speedstack.runtime.engine import DEFAULT_MAX_LENGTH
from speedstack.runtime.model.spec import spec_from_config
from speedstack.runtime.rounds.speculation import NGRAM, DraftStrategy

Proposer = Literal["none", "drafter", "ngram"]
REFERENCE = "reference"


@dataclass(frozen=True)
class Way:
    """One row: who proposes, how, on which backend, at which temperature."""

    name: str
    proposer: Proposer
    strategy: DraftStrategy = DraftStrategy()  # noqa: RUF009 - frozen
    temperature: float = 0.0
    backend: str = "auto"


def ways_of(num_proposals: int, tree_budgets: Sequence[int] = (8, 16, 32)) -> list[Way]:
    """The rows: greedy and at temperature 1, chains of all lengths, adaptive, look-up, trees."""
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
    ways += [replace(way, temperature=1.0) for way in sampled]
    if not tree_budgets:
        return ways
    trees = [Way("no drafter", "none"), Way("chain", "drafter")]
    trees += [Way(f"tree of {budget}", "drafter", DraftStrategy(tree_budget=budget)) for budget in tree_budgets]
    middle = sorted(tree_budgets)[len(tree_budgets) // 2]
    sampled = [
        Way("no drafter", "none"),
        Way("chain, argmax", "drafter"),
        Way("chain, shared noise", "drafter", DraftStrategy(noise="shared")),
        Way(f"tree of {middle}", "drafter", DraftStrategy(tree_budget=middle)),
        Way(f"tree of {middle}, shared noise", "drafter", DraftStrategy(noise="shared", tree_budget=middle)),
    ]
    trees += [replace(way, temperature=1.0) for way in sampled]
    return ways + [replace(way, backend=REFERENCE) for way in trees]


class Server:
    """One engine a backend; `run` gives it the proposer and the strategy of a row."""

    def __init__(self, target: Path, drafter: DFlashDraftModel, max_length: int | None, device: str = "auto") -> None:
        self._target, self._drafter, self._max_length, self._device = target, drafter, max_length, device
        self._engines: dict[str, tuple[Engine, Proposer]] = {}

    def engine(self, way: Way) -> Engine:
        """The engine, ready to decode as `way` says."""
        engine, proposer = self._engines.get(way.backend, (None, "none"))
        if engine is None:
            engine = Engine.from_pretrained(
                self._target,
                backend=way.backend,  # type: ignore[arg-type]
                device=self._device,
                max_length=self._max_length,
                max_batch_size=1,
            )
        if proposer != way.proposer:
            engine.set_drafter(None)
            if way.proposer != "none":
                engine.set_drafter(self._drafter if way.proposer == "drafter" else NGRAM)
        self._engines[way.backend] = engine, way.proposer
        engine.set_strategy(way.strategy)
        return engine

    def run(self, way: Way, prompt: list[int], num_new_tokens: int, seed: int) -> Generation:
        """One sequence."""
        engine = self.engine(way)
        found: Generation = engine.generate(
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
    num_reference_prompts: int,
    seed: int = 0,
    progress: bool = True,
) -> list[ServingRow]:
    """Counts, then times. Raises ValueError when a text differs from the one without proposals.

    `num_reference_prompts`: prompts of each set, and of a repeat, that rows of the reference backend decode.
    """
    if num_repeats < 0 or num_timed_prompts < 1 or num_reference_prompts < 1:
        raise ValueError("a serving bench needs at least one prompt to time, and one for the reference backend")

    def sets_of(way: Way) -> dict[str, Sequence[list[int]]]:
        count = num_reference_prompts if way.backend == REFERENCE else None
        return {name: group[:count] for name, group in prompt_sets.items()}

    def timed_of(way: Way) -> list[list[int]]:
        prompts = [prompt for group in sets_of(way).values() for prompt in group]
        limit = min(num_timed_prompts, num_reference_prompts) if way.backend == REFERENCE else num_timed_prompts
        return prompts[:limit]

    total = sum(sum(map(len, sets_of(way).values())) + num_repeats * len(timed_of(way)) for way in ways)
    texts: dict[tuple[str, float], list[list[int]]] = {}
    counted: list[dict[str, list[Generation]]] = []
    with tqdm(total=total, desc="serving", disable=not progress, dynamic_ncols=True) as bar:
        for way in ways:
            found: dict[str, list[Generation]] = {}
            for name, group in sets_of(way).items():
                found[name] = []
                for prompt in group:
                    found[name].append(server.run(way, prompt, num_new_tokens, seed))
                    bar.update()
            tokens = [generation.tokens for group in found.values() for generation in group]
            if texts.setdefault((way.backend, way.temperature), tokens) != tokens:
                raise ValueError(
                    f"{way.name!r} on backend {way.backend} changed a text: that is a fault, do not use it"
                )
            counted.append(found)

        def rate(index: int, turn: int) -> float:
            """Tokens a second of the timed prompts."""
            stats = []
            for prompt in timed_of(ways[index]):
                stats.append(server.run(ways[index], prompt, num_new_tokens, seed).stats)
                bar.update()
            return sum(one.num_round_tokens for one in stats) / sum(one.decode_seconds for one in stats)

        by_way = in_turns(range(len(ways)), rate, num_repeats, num_warmups=0, orders=random.Random(seed))
    rates = list(by_way.values())
    return [
        ServingRow(
            name=way.name,
            proposer=way.proposer,
            strategy=asdict(way.strategy),
            backend=server.engine(way).backend_name,
            temperature=way.temperature,
            acceptance=summarize("all prompts", [one for group in found.values() for one in group]),
            sets=tuple(summarize(name, group) for name, group in found.items()),
            num_timed_prompts=len(timed_of(way)),
            decode_tokens_per_second=spread(rates[index]) if rates[index] else None,
            speedup_over_chain=_over_chain(index, ways, rates),
        )
        for index, (way, found) in enumerate(zip(ways, counted, strict=True))
    ]


def _over_chain(index: int, ways: Sequence[Way], rates: Sequence[Sequence[float]]) -> Spread | None:
    """Of the tree at `index`, its tokens a second over those of the chain that differs from it in nothing else."""
    way = ways[index]
    chain = replace(way, name="", strategy=replace(way.strategy, tree_budget=None))
    others = [i for i, other in enumerate(ways) if replace(other, name="") == chain]
    if way.strategy.tree_budget is None or not others or not rates[index]:
        return None
    return spread([tree / plain for tree, plain in zip(rates[index], rates[others[0]], strict=True)])


def prompt_sets_of(
    source: Path, target: Path, num_prompts: int, num_tokens: int, max_tokens: int
) -> dict[str, Sequence[list[int]]]:
    """Set name -> prompts: of `num_tokens` of a corpus, or those of a file, of at most `max_tokens`.

    Raises ValueError, one line, for what is neither a corpus nor a file of prompts.
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
    ratio("tree/chain", "speedup_over_chain.median"),
)


def main() -> None:
    """See the module."""
    command = parser("serving", __doc__)
    command.add_argument("--target", type=Path, required=True, help="model directory")
    command.add_argument("--drafter", type=Path, required=True, help="drafter directory")
    command.add_argument("--prompts", type=Path, required=True, help="prepared corpus, or JSONL with the field prompt")
    command.add_argument("--out", type=Path, help="result file")
    command.add_argument("--num-prompts", type=int, default=16, help="prompts of each set (default: %(default)s)")
    command.add_argument(
        "--num-prompt-tokens", type=int, default=64, help="of a corpus' prompts (default: %(default)s)"
    )
    command.add_argument("--num-new-tokens", type=int, default=128, help="a prompt (default: %(default)s)")
    command.add_argument("--num-repeats", type=int, default=5, help="timed; 0 counts only (default: %(default)s)")
    command.add_argument("--num-timed-prompts", type=int, default=4, help="of a repeat (default: %(default)s)")
    command.add_argument("--num-reference-prompts", type=int, default=4, help="for its rows (default: %(default)s)")
    command.add_argument("--tree-budget", type=int, nargs="*", default=[8, 16, 32], help="of the trees; none: no trees")
    command.add_argument("--max-length", type=int, help="positions of a sequence's buffers")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of sampling and of the order (default: %(default)s)")
    arguments = command.parse_args()
    try:
        result = bench(arguments)
    except (ValueError, OSError) as error:
        command.exit(1, f"error: {error}\n")
    finish(Table.of(COLUMNS, result.rows).text(), result, arguments.out)


def bench(arguments: argparse.Namespace) -> ServingBench:
    """The whole measurement. Raises ValueError as its parts do."""
    window = spec_from_config(read_config(arguments.target)[0]).max_position_embeddings
    max_length = arguments.max_length or min(window, DEFAULT_MAX_LENGTH)
    prompt_sets = prompt_sets_of(
        arguments.prompts,
        arguments.target,
        arguments.num_prompts,
        arguments.num_prompt_tokens,
        max_length - arguments.num_new_tokens,
    )
    drafter = load_drafter(arguments.drafter)
    ways = ways_of(drafter.config.num_proposals, arguments.tree_budget)
    rows = measure_serving(
        Server(arguments.target, drafter, arguments.max_length, arguments.device),
        ways,
        prompt_sets,
        arguments.num_new_tokens,
        arguments.num_repeats,
        arguments.num_timed_prompts,
        arguments.num_reference_prompts,
        arguments.seed,
    )
    return ServingBench(
        target=str(arguments.target),
        drafter=str(arguments.drafter),
        prompts=str(arguments.prompts),
        num_prompts=sum(len(group) for group in prompt_sets.values()),
        num_new_tokens=arguments.num_new_tokens,
        num_repeats=arguments.num_repeats,
        seed=arguments.seed,
        rows=tuple(rows),
        environment=describe_environment(),
    )


if __name__ == "__main__":
    main()

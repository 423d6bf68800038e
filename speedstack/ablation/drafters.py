"""Drafters compared: rows that differ by named options, trained on the same data for the same time, over seeds.

    python -m speedstack.ablation.drafters configs/drafter_ablation/tiny.yaml

All rows read the same text and features, made once. Their steps are timed in turns first, and each row gets as many
steps as the time budget buys, so a loss that costs twice as much must learn twice as much per step. Later rows are
timed beside an earlier one. Acceptance is simulated on greedy text of held-out prompts, and served, greedily and at
temperature 1, also on code prompts from a file. Prompt lookup is a row without training.

The same command goes on with what is missing. Rows whose settings or prompts differ from the directory's are refused.

    OUT/runs/<row>-seed-<n>/         a run; OUT/rows/ has its measurements
    OUT/settings.json  times.json    definitions of rows and measurements; step times
    OUT/results.json  results.md     rewritten whenever a row is complete
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from speedstack.ablation.drafters_config import NGRAM, AblationConfig
from speedstack.ablation.step_times import added_times, first_times, time_steps
from speedstack.dflash.accept import survival, walk_rounds
from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.ngram import NgramIndex
from speedstack.eval.data.prompts import PromptLoader
from speedstack.eval.results.ablation import AblationTimes, DraftedSet, DrafterAblation, DrafterRun
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.metrics import read_metrics
from speedstack.eval.speed.acceptance import summarize
from speedstack.quant.checkpoint import weights_sha256
from speedstack.quant.checkpoint.digest import model_sha256
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine
from speedstack.runtime.rounds.speculation import DraftStrategy
from speedstack.support.command import module_command, module_parser
from speedstack.support.config import read_config, validated
from speedstack.support.digests import file_sha256
from speedstack.support.files import exclusive, write_atomically
from speedstack.support.steps import Step, StepStore
from speedstack.train.config.recipes import DrafterConfig, config_hash, identity
from speedstack.train.core.distributed import World, resolve_device
from speedstack.train.core.loop import run
from speedstack.train.core.make_trainer import make_trainer
from speedstack.train.drafter.evaluation import GreedyText
from speedstack.train.drafter.frozen_target import SharedTarget
from speedstack.train.drafter.job import make_recipe
from speedstack.train.drafter.recipe import DrafterRecipe

HELDOUT = "held-out"  # also decoded by sampling; code prompts only greedily


class Ablation:
    """One ablation directory; `run` does what is missing and returns all results."""

    def __init__(self, config: AblationConfig, only: Sequence[str] | None = None) -> None:
        """`only`: the rows to run, None for all. Raises ValueError for rows that cannot be run."""
        self.config = config
        unknown = [row for row in only or () if row not in config.rows]
        if unknown:
            raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(config.rows)}")
        self.rows = list(config.rows) if only is None else list(only)
        self.trained = [row for row in self.rows if row != NGRAM]
        configs = {row: config.row_config(row, config.seeds[0]) for row in self.trained}
        if not configs:
            raise ValueError("an ablation needs a row that is trained")
        first = next(iter(configs.values()))
        for row, other in configs.items():
            if _shared(other) != _shared(first):
                raise ValueError(
                    f"row {row} has another target, corpus or device than {self.trained[0]}: rows share them"
                )
        length, num_heldout = first.data.sequence_length, first.drafter.num_eval_sequences
        if first.drafter.prompt_length + config.num_new_tokens > length:
            raise ValueError(f"num_new_tokens {config.num_new_tokens} do not fit a window of {length} with its prompt")
        if config.num_prompts > num_heldout:
            raise ValueError(f"num_prompts {config.num_prompts} is more than drafter.num_eval_sequences {num_heldout}")
        self.first = first
        self.world = World(rank=0, size=1, device=resolve_device(first.run.device))
        self.store = StepStore(config.out, "rows/{name}.json")
        self._load_target = SharedTarget()
        self._engine: Engine | None = None

    def run(self, on_row: Any = None) -> DrafterAblation:
        """Data, times, runs, `results.json` and `results.md`. Raises as training, and ValueError if in use."""
        with exclusive(self.config.out):
            return self._run(on_row)

    def _run(self, on_row: Any) -> DrafterAblation:
        self._prepare()
        times = self._times()
        texts = self._texts()
        runs: list[DrafterRun] = []
        for seed in self.config.seeds:
            for row in self.rows:
                runs.append(self._one(row, seed, times, texts))
                if on_row is not None:
                    on_row(runs[-1])
                self._result(times, runs).save(self.config.out / "results.json")
        result = self._result(times, runs)
        result.save(self.config.out / "results.json")
        write_atomically(self.config.out / "results.md", result.table())
        return result

    def _result(self, times: AblationTimes, runs: Sequence[DrafterRun]) -> DrafterAblation:
        return DrafterAblation(
            target_sha256=weights_sha256(self.first.drafter.target),
            budget_seconds=self.config.budget_seconds,
            num_new_tokens=self.config.num_new_tokens,
            rows=json.loads(json.dumps({row: self.config.rows[row] for row in self.rows}, default=str)),
            times=times,
            runs=tuple(runs),
            environment=describe_environment(),
        )

    def _prepare(self) -> None:
        """Make text and features by building the row that needs most of them."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        self._claim()
        soft = [row for row in self.trained if make_recipe(self.config.row_config(row, 0)).objective.is_soft]
        self._recipe(soft[0] if soft else self.trained[0])

    @cached_property
    def _measured(self) -> dict[str, Any]:
        """Settings that decide how rows are measured."""
        config = self.config
        return {
            "target_sha256": model_sha256(self.first.drafter.target),
            "num_prompts": config.num_prompts,
            "num_new_tokens": config.num_new_tokens,
            "code_prompts": None if config.code_prompts is None else _prompts_sha256(config.code_prompts),
            "num_code_prompts": config.num_code_prompts,
            "ngram_size": config.ngram_size,
        }

    def _claim(self) -> None:
        """Record settings of rows and measurements. Raises ValueError if the directory has another row of that name."""
        config, file, measured = self.config, self.config.out / "settings.json", self._measured
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"measured": measured, "rows": {}}
        if any(config.out.glob("runs/*")) and not (config.out / "rows").is_dir():
            raise ValueError(
                f"{config.out} holds rows of another version of speedstack, which alone can go on there: choose "
                "another out"
            )
        # Older directories lack newer settings.
        changed = [name for name, value in measured.items() if known["measured"].get(name, value) != value]
        if changed:
            raise ValueError(f"{config.out} holds rows measured with another {', '.join(changed)}: choose another out")
        rows = {row: config_hash(config.row_config(row, 0)) for row in self.trained}
        changed = [row for row, digest in rows.items() if known["rows"].get(row, digest) != digest]
        if changed:
            raise ValueError(
                f"{config.out} holds a row {changed[0]} with other settings: rename it here, or choose another out"
            )
        known["measured"], known["rows"] = measured, known["rows"] | rows
        write_atomically(file, json.dumps(known, indent=2) + "\n")

    def _recipe(self, row: str) -> tuple[DrafterRecipe, torch.nn.Module]:
        recipe = make_recipe(self.config.row_config(row, self.config.seeds[0]), load_target=self._load_target)
        torch.manual_seed(self.config.seeds[0])
        return recipe, recipe.build(self.world).train()

    def _times(self) -> AblationTimes:
        """Step times of all rows; rows missing from an earlier file are timed beside one in it."""
        file = self.config.out / "times.json"
        known = AblationTimes.load(file) if file.is_file() else None
        if known is not None and known.budget_seconds != self.config.budget_seconds:
            raise ValueError(
                f"{file} was measured for a budget of {known.budget_seconds} s: choose another out, or delete it"
            )
        missing = [row for row in self.trained if known is None or known.row(row) is None]
        if known is not None and not missing:
            return known
        timed = missing if known is None else [self._reference(known), *missing]
        contestants = {}
        for row in timed:
            recipe, model = self._recipe(row)
            contestants[row] = recipe, make_trainer(model, recipe.config, self.world)
        measured = time_steps(contestants, self.world, self.config.num_timed_steps)
        times = first_times(measured, self.config.budget_seconds) if known is None else added_times(measured, known)
        times.save(file)
        return times

    def _reference(self, known: AblationTimes) -> str:
        """An unchanged row of `known`, of the first call if possible, that can be timed again."""
        digests = json.loads((self.config.out / "settings.json").read_text(encoding="utf-8"))["rows"]
        present = {entry.row: entry for entry in known.rows if entry.row in self.config.rows}
        found = {row: config_hash(self.config.row_config(row, 0)) for row in present}
        unchanged = [entry for row, entry in present.items() if digests.get(row, found[row]) == found[row]]
        if not unchanged:
            raise ValueError(
                f"{self.config.out} was timed with rows that this config lacks or has changed, and new ones are timed "
                f"beside one of them: add one of {', '.join(entry.row for entry in known.rows)} to rows as it was"
            )
        return min(unchanged, key=lambda entry: entry.beside is not None).row

    def _texts(self) -> dict[str, GreedyText]:
        """Greedy text of the decoded prompts; simulation reads it, and no drafter changes it."""
        recipe, _ = self._recipe(self.trained[0])
        config, length = self.config, recipe.config.data.sequence_length
        prompt_length = recipe.config.drafter.prompt_length
        ids_NT = recipe.heldout.ids_NT[: config.num_prompts, : prompt_length + config.num_new_tokens]
        texts = {HELDOUT: GreedyText.of_windows(ids_NT, prompt_length)}
        if config.code_prompts is not None:
            engine = self._serving()
            tokenizer = load_tokenizer(self.first.drafter.target)
            room = length - config.num_new_tokens
            fitting, notes = PromptLoader(tokenizer, room, config.num_code_prompts).read_file(config.code_prompts)
            prompts = fitting[: config.num_code_prompts]
            if not prompts:
                raise ValueError(f"{config.code_prompts} has no prompt of 1 to {room} tokens")
            if len(prompts) < config.num_code_prompts:
                said = "; ".join((f"{len(prompts)} of num_code_prompts {config.num_code_prompts} are there", *notes))
                warnings.warn(f"{config.code_prompts}: {said}", stacklevel=2)
            written = engine.generate(prompts, max_new_tokens=config.num_new_tokens, ignore_eos=True)
            sequences = [prompt + generation.tokens for prompt, generation in zip(prompts, written, strict=True)]
            padded = [torch.tensor(sequence) for sequence in sequences]
            texts["code"] = GreedyText(
                torch.nn.utils.rnn.pad_sequence(padded, batch_first=True),
                [len(prompt) for prompt in prompts],
                [len(sequence) for sequence in sequences],
            )
        return texts

    def _serving(self) -> Engine:
        if self._engine is None:
            section = self.first.drafter
            self._engine = Engine.from_pretrained(
                section.target,
                device=self.first.run.device,
                max_length=self.first.data.sequence_length,
                max_batch_size=1,
            )
        return self._engine

    def _one(self, row: str, seed: int, times: AblationTimes, texts: Mapping[str, GreedyText]) -> DrafterRun:
        if row == NGRAM:
            sets = {name: self._lookup(text, name == HELDOUT) for name, text in texts.items()}
            return DrafterRun(
                row=row, seed=seed, num_steps=0, seconds=0.0, heldout=sets[HELDOUT], code=sets.get("code")
            )
        timed = times.row(row)
        assert timed is not None
        config = self.config.row_config(row, seed, timed.num_steps)
        place = config.run_directory.relative_to(self.config.out).as_posix()
        step = Step(
            kind=config.run.name,
            version=1,
            settings={"measured": self._measured, "config": identity(config)},
            outputs=(place,),
            decisive=(f"{place}/export",),
        )
        self.store.make(step, lambda needs, directory: self._train(row, config, texts).model_dump(mode="json"))
        return DrafterRun.model_validate(self.store.result(step))

    def _train(self, row: str, config: DrafterConfig, texts: Mapping[str, GreedyText]) -> DrafterRun:
        """Train a row with one seed and measure the result."""
        recipe = make_recipe(config, load_target=self._load_target)
        trained = run(recipe, config)
        seconds = [line["elapsed_seconds"] for line in read_metrics(trained.path) if line["kind"] == "train"][-1]
        if not hasattr(recipe, "target"):  # the run had finished before it was measured
            recipe.build(self.world)
        model = recipe.load_export(trained.export_path).eval()
        sets = {name: self._measure(recipe, model, text, name == HELDOUT) for name, text in texts.items()}
        return DrafterRun(
            row=row,
            seed=config.run.seed,
            num_steps=config.loop.num_steps,
            seconds=seconds,
            heldout=sets[HELDOUT],
            code=sets.get("code"),
        )

    def _measure(
        self, recipe: DrafterRecipe, model: torch.nn.Module, text: GreedyText, with_samples: bool
    ) -> DraftedSet:
        simulated = recipe.simulate(model, text)
        return DraftedSet(
            num_prompts=len(text.lengths),
            tau_simulated=simulated.acceptance_length(),
            survival=tuple(simulated.survival(recipe.draft_config.num_proposals)),
            **(self._serve(model, text, with_samples) if isinstance(model, DFlashDraftModel) else {}),
        )

    def _serve(
        self, drafter: DFlashDraftModel | Literal["ngram"], text: GreedyText, with_samples: bool
    ) -> dict[str, float]:
        """Acceptance on the prompts of `text` as decoded by the engine, and greedy tokens/s, one prompt at a time."""
        engine, num_new = self._serving(), self.config.num_new_tokens
        engine.set_drafter(drafter)
        if drafter == NGRAM:
            strategy = DraftStrategy(num_drafts=self.first.drafter.block_size - 1, ngram_size=self.config.ngram_size)
            engine.set_strategy(strategy)
        prompts = [ids[:length] for ids, length in zip(text.ids_NT.tolist(), text.prompt_lengths, strict=True)]
        greedy = engine.generate(prompts, max_new_tokens=num_new, ignore_eos=True)
        served = {
            "tau_served": summarize("greedy", greedy).acceptance_length,
            "tokens_per_second": sum(g.stats.num_round_tokens for g in greedy)
            / sum(g.stats.decode_seconds for g in greedy),
        }
        if with_samples:
            sampled = engine.generate(prompts, max_new_tokens=num_new, temperature=1.0, ignore_eos=True)
            served["tau_served_t1"] = summarize("temperature 1", sampled).acceptance_length
        if with_samples and drafter != NGRAM:
            engine.set_strategy(DraftStrategy(noise="shared"))
            shared = engine.generate(prompts, max_new_tokens=num_new, temperature=1.0, ignore_eos=True)
            served["tau_served_t1_shared_noise"] = summarize("shared noise", shared).acceptance_length
        engine.set_drafter(None)
        return served

    def _lookup(self, text: GreedyText, with_samples: bool) -> DraftedSet:
        """Prompt lookup on the same text, simulated like a drafter: its proposals at every position."""
        num_proposals = self.first.drafter.block_size - 1
        rounds: list[list[int]] = []
        for ids, prompt_length, length in zip(text.ids_NT.tolist(), text.prompt_lengths, text.lengths, strict=True):
            index, runs = NgramIndex(self.config.ngram_size), []
            for anchor in range(prompt_length, length - 1):
                drafts = index.propose(ids[: anchor + 1], num_proposals)
                agree = [draft == token for draft, token in zip(drafts, ids[anchor + 1 : length], strict=False)]
                runs.append([*agree, False].index(False))
            rounds.append(walk_rounds(runs))
        return DraftedSet(
            num_prompts=len(text.lengths),
            tau_simulated=sum(map(sum, rounds)) / sum(map(len, rounds)),
            survival=tuple(survival(rounds, num_proposals)),
            **self._serve(NGRAM, text, with_samples),
        )


def _shared(config: DrafterConfig) -> tuple[Any, ...]:
    """Settings common to all rows."""
    return config.drafter.target, config.data, config.run.device


def _prompts_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ValueError(f"cannot read prompts {path}: {error.strerror}") from error


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train and measure, print the table."""
    parser = module_parser(__spec__, __doc__, out="directory of the ablation")
    parser.add_argument(
        "config", type=Path, help="YAML of an AblationConfig, such as configs/drafter_ablation/tiny.yaml"
    )
    parser.add_argument("--target", help="model directory the drafters are for")
    parser.add_argument("--corpus", help="prepared corpus of that model")
    parser.add_argument("--text", help="directory of the text it has written, or will write")
    parser.add_argument("--code-prompts", type=Path, help=".jsonl with a field `prompt`")
    parser.add_argument("--budget-seconds", type=float, help="training time of every run")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of every row")
    parser.add_argument("--rows", nargs="+", help="these rows alone")
    options = parser.parse_args(arguments)
    config = _with_options(read_config(AblationConfig, options.config), options)
    result = Ablation(config, options.rows).run(on_row=_print_run)
    print(result.table())
    print(f"written: {config.out / 'results.json'}")


def _with_options(config: AblationConfig, options: argparse.Namespace) -> AblationConfig:
    raw = config.model_dump()
    for name in ("out", "code_prompts", "budget_seconds", "seeds"):
        if getattr(options, name) is not None:
            raw[name] = getattr(options, name)
    for name, field in (("target", "drafter.target"), ("corpus", "data.corpus"), ("text", "drafter.text")):
        if getattr(options, name) is not None:
            raw["common"][field] = getattr(options, name)
    return validated(AblationConfig, raw)


def _print_run(run: DrafterRun) -> None:
    served = "" if run.heldout.tau_served is None else f", served {run.heldout.tau_served:.3f}"
    print(
        f"{run.row} seed {run.seed}: {run.num_steps} steps in {run.seconds:.0f} s, tau {run.heldout.tau_simulated:.3f}"
        f"{served}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

"""The job of training a drafter: the recipe of its architecture, and the engine's acceptance of the result."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from speedstack.eval.results.speed import AcceptanceResult
from speedstack.eval.speed.acceptance import measure_acceptance
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.support.files import write_atomically
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.loop import OnStep, RunResult, run
from speedstack.train.drafter.eagle import EagleRecipe
from speedstack.train.drafter.frozen_target import FrozenTarget, LoadTarget
from speedstack.train.drafter.recipe import DrafterRecipe
from speedstack.train.drafter.text import needed_corpus, serving_engine, splits_of


def make_recipe(
    config: DrafterConfig, show_progress: bool = True, load_target: LoadTarget = FrozenTarget
) -> DrafterRecipe:
    """The recipe of the configured architecture. Raises ValueError for options that it lacks."""
    if config.drafter.architecture == "eagle":
        return EagleRecipe(config, show_progress, load_target)
    return DrafterRecipe(config, show_progress, load_target)


def train_drafter(config: DrafterConfig, on_step: OnStep | None = None) -> RunResult:
    """Train, export, and measure acceptance with the engine on all held-out prompts.

    A finished run returns at once, an interrupted one resumes. The engine's acceptance is in `metrics` as
    `engine_acceptance_length` and in the run's `acceptance.json`; if it fails, a warning says why. Raises ValueError
    for a target, corpus, text or settings that do not fit; OSError for the disk.
    """
    recipe = make_recipe(config, show_progress=on_step is None)
    result = run(recipe, config, on_step)
    file = result.path / "acceptance.json"
    if config.drafter.architecture == "dflash" and not file.is_file() and int(os.environ.get("RANK", "0")) == 0:
        try:
            write_atomically(file, _engine_acceptance(config, result.export_path).model_dump_json(indent=2) + "\n")
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            warnings.warn(
                f"the drafter is at {result.export_path}; its acceptance is not measured: {error}", stacklevel=2
            )
    if file.is_file():
        measured = AcceptanceResult.model_validate_json(file.read_text(encoding="utf-8"))
        result.metrics["engine_acceptance_length"] = measured.overall.acceptance_length
    return result


def _engine_acceptance(config: DrafterConfig, drafter: Path) -> AcceptanceResult:
    """Greedy acceptance of the exported drafter on all held-out prompts. Raises as its parts."""
    engine = serving_engine(config, drafter)
    tokenizer = load_tokenizer(config.drafter.target)
    split = splits_of(config, tokenizer, needed_corpus(config, tokenizer))["heldout"]
    prompts, sampling = {"held-out": split.prompt_lists()}, split.sampling
    return measure_acceptance(engine, prompts, sampling.num_new_tokens, ignore_eos=not sampling.stops_at_eos)

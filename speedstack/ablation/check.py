"""Checks of a grid before any step runs, because a later failure costs an hour."""

from __future__ import annotations

import torch

from speedstack.ablation.config import TRAINED, AblateConfig, RowSpec, drafter_config
from speedstack.ablation.rows import predict
from speedstack.eval.quality.heldout import corpus_windows
from speedstack.quant.checkpoint.config import build_skeleton, read_config
from speedstack.quant.checkpoint.files import WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.formats import fake_quantize, number_format
from speedstack.quant.ptq import weights_of
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.perf.gpus import gpu_named
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.data.corpus import load_corpus
from speedstack.train.data.heldout import heldout_prompts


def check(config: AblateConfig) -> None:
    """Raise ValueError for a checkpoint that is missing, broken or quantized, a corpus of another tokenizer or with too
    few prompts, weights that do not fit a format's blocks, and a family that a step does not support.
    """
    directory = checkpoint_directory(config.model)
    model_config, codec = read_config(directory)
    if codec.is_packed:
        raise ValueError(f"{directory} is quantized already: give the model it was made from")
    with WeightFiles(directory):
        pass
    corpus_windows(config.corpus, directory, config.heldout.window, config.heldout.num_tokens)
    rows = config.rows()
    if any(row.is_packed and row.method not in TRAINED for row in rows):
        hub_names(model_config.model_type)
    _check_weights(model_config, rows)
    has_drafters = any(row.drafter != "none" for row in rows)
    if config.suite.name is not None or config.speed.num_repeats or has_drafters:
        try:
            spec_from_config(model_config)
        except ValueError as error:
            raise ValueError(
                f"{error}; to measure divergence alone set suite.name null, speed.num_repeats 0, and no drafters"
            ) from error
    if has_drafters:
        _check_drafter(drafter_config(config, config.model, config.out))
    if has_drafters or config.speed.num_repeats:
        speed = config.speed
        heldout_prompts(load_corpus(config.corpus), speed.num_prompts, speed.num_prompt_tokens, config.seed)
    if config.predict.gpu is not None:
        gpu_named(config.predict.gpu)
        try:
            predict(config.model, RowSpec("", "", "none", "none", 0.0), config.predict, None, 1.0)
        except ValueError as error:
            raise ValueError(f"predict: {error}; or set predict.gpu null") from error


def _check_weights(model_config: object, rows: list[RowSpec]) -> None:
    """Check that every row's modules exist and their weights' rows are whole blocks of its format."""
    skeleton = build_skeleton(model_config)  # type: ignore[arg-type]
    for format_name, modules in sorted({(row.format, row.modules) for row in rows if row.format}):
        chosen = number_format(format_name)
        for name, weight in weights_of(skeleton, modules).items():  # type: ignore[arg-type]
            try:
                fake_quantize(torch.zeros(1, weight.shape[-1]), chosen.name)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _check_drafter(drafter: DrafterConfig) -> None:
    if drafter.drafter.architecture != "dflash":
        raise ValueError("drafter.set: rows with a drafter are decoded, which no engine does with architecture eagle")

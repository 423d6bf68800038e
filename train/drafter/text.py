"""The text a drafter is trained and judged on, as a stage before training: prompts and the target's continuations.

Prompts are pieces of corpus documents, or come from a source (`data/prompts.py`) that may bring answers. Training text
is sampled; evaluation text is greedy, because greedy text does not depend on the drafter. Both are resumed shard by
shard (`data/selftext.py`).

Shapes: N sequences, P prompt tokens, T tokens of a window.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.digest import model_sha256
from speedstack.quant.checkpoint.generation import end_token_ids
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.rundir import has_begun
from speedstack.train.data.corpus import Corpus, corpus_for
from speedstack.train.data.packing import Sequences
from speedstack.train.data.prompts import prepare_prompts
from speedstack.train.data.selftext import (
    Prompts,
    Sampling,
    continue_prompts,
    cut_prompts,
    load_text,
    make_way,
    num_sequences_of,
)

# First keys of the random generators, so that no two uses share numbers; the recipe continues the count.
TRAIN_PROMPTS, EVAL_PROMPTS, ORDER, ANCHORS = range(4)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Split:
    """Prompts, int64 [N, P] or lists of any lengths, with their sampling or the given answers."""

    prompts: Prompts
    sampling: Sampling
    given: list[list[int]] | None = None

    def prompt_lists(self) -> list[list[int]]:
        return self.prompts.tolist() if isinstance(self.prompts, torch.Tensor) else [list(ids) for ids in self.prompts]


def write_text(config: DrafterConfig, on_progress: OnProgress | None = None) -> None:
    """Write or complete the text of `config`; training then finds it. `on_progress(done, total)` counts sequences.

    Raises ValueError for prompts or settings that do not fit the target or existing text; OSError for the disk.
    """
    target = config.drafter.target
    tokenizer = load_tokenizer(target, read_config(target)[0].get_text_config().vocab_size)
    splits = splits_of(config, tokenizer, needed_corpus(config, tokenizer))
    digest = model_sha256(target)
    make_way_for(config, splits, digest)
    write_splits(config, splits, digest, on_progress)


def needed_corpus(config: DrafterConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    """The corpus, prepared if missing; None if neither prompts nor windows need it."""
    if config.drafter.prompts.source is not None and config.drafter.written_fraction == 1:
        return None
    return corpus_for(config.data, tokenizer)


def splits_of(config: DrafterConfig, tokenizer: PreTrainedTokenizerBase, corpus: Corpus | None) -> dict[str, Split]:
    """Prompts and sampling of each split. Raises as `prepare_prompts` and `cut_prompts`."""
    section = config.drafter
    seed = config.run.seed if section.text_seed is None else section.text_seed
    greedy = Sampling(config.data.sequence_length - section.prompt_length)
    sampled = replace(greedy, temperatures=section.temperatures, top_p=section.top_p, seed=seed)
    if section.prompts.source is None:
        assert corpus is not None
        heldout_NP = cut_prompts(corpus.heldout, section.num_eval_sequences, section.prompt_length, seed, EVAL_PROMPTS)
        splits = {"heldout": Split(heldout_NP, greedy)}
        if section.written_fraction > 0:
            train_NP = cut_prompts(corpus.train, section.num_sequences, section.prompt_length, seed, TRAIN_PROMPTS)
            splits["train"] = Split(train_NP, sampled)
        return splits
    vocab_size = read_config(section.target)[0].get_text_config().vocab_size
    end_ids = end_token_ids(section.target, vocab_size, tokenizer)
    prepared = prepare_prompts(
        text_path(config) / "prompts", config, tokenizer, seed, end_ids, may_replace_text(config)
    )
    chat = {"stops_at_eos": True, "chat_template_sha256": prepared.facts["chat_template_sha256"]}
    splits = {"heldout": Split([c.prompt for c in prepared.heldout], replace(greedy, **chat))}
    if section.written_fraction > 0:
        given = [c.response for c in prepared.train] if section.prompts.responses == "given" else None
        splits["train"] = Split([c.prompt for c in prepared.train], replace(sampled, **chat), given)
    return splits


def may_replace_text(config: DrafterConfig) -> bool:
    """Whether text that does not fit may be set aside: it is the run's own and untrained on."""
    return config.drafter.text is None and not has_begun(config.run_directory)


def make_way_for(config: DrafterConfig, splits: dict[str, Split], target_sha256: str) -> None:
    """Set aside another config's text that a job left in the run directory before it trained."""
    if may_replace_text(config):
        for name, split in splits.items():
            if split.given is None:
                make_way(text_path(config) / name, target_sha256, split.prompts, split.sampling)


def write_splits(
    config: DrafterConfig,
    splits: dict[str, Split],
    target_sha256: str,
    on_progress: OnProgress | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write this rank's part of all splits, with one engine and one progress count."""
    splits = {name: split for name, split in splits.items() if split.given is None}
    done = {name: 0 for name in splits}
    total = sum(num_sequences_of(len(split.prompts), rank, world_size) for split in splits.values())
    engines: list[Engine] = []

    def engine() -> Engine:
        if not engines:
            engines.append(serving_engine(config))
        return engines[0]

    for name, split in splits.items():

        def advance(num: int, name: str = name) -> None:
            done[name] = num
            if on_progress is not None:
                on_progress(sum(done.values()), total)

        path = text_path(config) / name
        continue_prompts(path, engine, target_sha256, split.prompts, split.sampling, rank, world_size, advance)


def read_split(config: DrafterConfig, name: str, split: Split, target_sha256: str) -> Sequences:
    """Text that `write_splits` wrote. Raises ValueError if it is missing, corrupt or of other settings."""
    prompts = split.prompt_lists()
    if split.given is None:
        ids = load_text(text_path(config) / name, target_sha256, split.prompts, split.sampling)
    else:
        ids = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, split.given, strict=True)]
    return Sequences(ids, [len(prompt) for prompt in prompts])


def describe_text(config: DrafterConfig, splits: dict[str, Split]) -> str:
    """The model card's description of the training text."""
    section, data = config.drafter, config.data
    kwargs = section.prompts.chat_template_kwargs
    num_new = data.sequence_length - section.prompt_length
    how = f"at temperature {', '.join(map(str, section.temperatures))}"
    if section.prompts.source is None:
        written = (
            f"{section.num_sequences} texts of {num_new} tokens that the target wrote after prompts of "
            f"{section.prompt_length}, {how}"
        )
    else:
        train = splits.get("train")
        facts = json.loads((text_path(config) / "prompts" / "prompts.json").read_text(encoding="utf-8"))
        digest = f"SHA-256 of the ids {facts['train_sha256']}"
        given = train is not None and train.given is not None
        whose = "came with them" if given else f"the target wrote, {how}, {num_new} tokens at most"
        num_train = 0 if train is None else len(train.prompts)
        heldout = section.prompts.heldout_source or "the same source"
        written = (
            f"{num_train} prompts of {section.prompts.source}, {digest}, with answers that {whose}; "
            f"{len(splits['heldout'].prompts)} held-out prompts of {heldout}"
            f"{f'; chat template with {json.dumps(kwargs)}' if kwargs else ''}"
        )
    return f"{written}; {section.written_fraction:.0%} of the windows, the others from the corpus {data.source}"


def text_path(config: DrafterConfig) -> Path:
    """Directory of the text of `config`."""
    return config.drafter.text or config.run_directory / "text"


def serving_engine(config: DrafterConfig, drafter: Path | None = None) -> Engine:
    """The engine that serves the target on the configured device."""
    section = config.drafter
    return Engine.from_pretrained(
        section.target,
        drafter=drafter,
        device=config.run.device,
        max_length=config.data.sequence_length,
        max_batch_size=section.generation_batch_size,
    )

"""The text a drafter is trained and judged on, as a stage before training: prompts, and what the target makes of them.

Prompts are pieces of the corpus's documents. Training text is sampled at the configured temperatures; evaluation text
is greedy continuations of held-out prompts, because greedy text does not depend on the drafter. Both stay on disk and
are resumed shard by shard (`selftext.py`).

Shapes: N sequences, P prompt tokens, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from speedstack.quant.checkpoint import weights_sha256
from speedstack.runtime import Engine
from speedstack.train.config import DrafterConfig
from speedstack.train.corpus import Corpus, corpus_for
from speedstack.train.qat import load_tokenizer
from speedstack.train.selftext import Sampling, continue_prompts, cut_prompts, load_text, num_sequences_of

# First keys of the random generators, so that no two uses share numbers; the recipe continues the count.
TRAIN_PROMPTS, EVAL_PROMPTS, ORDER, ANCHORS = range(4)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class WrittenText:
    """Windows of the target's text: tokens and documents int64 [N, T], and bool [N, T] where the target wrote."""

    ids_NT: Tensor
    documents_NT: Tensor
    predictable_NT: Tensor

    def __len__(self) -> int:
        return len(self.ids_NT)

    @classmethod
    def of_continuations(cls, ids_NT: Tensor, prompt_length: int) -> WrittenText:
        """One document a window, end-of-text or not: in serving the context is never cut either."""
        predictable_NT = (torch.arange(ids_NT.shape[1]) >= prompt_length).expand(ids_NT.shape).contiguous()
        return cls(ids_NT, torch.zeros_like(ids_NT), predictable_NT)


@dataclass(frozen=True)
class Split:
    """Prompts int64 [N, P], and how the target continues them."""

    prompts_NP: Tensor
    sampling: Sampling


def write_text(config: DrafterConfig, on_progress: OnProgress | None = None) -> None:
    """Write, or complete, the text that training and evaluation of `config` read; training then finds it there.

    `on_progress(done, total)` counts sequences. Raises ValueError for prompts and settings that do not fit the target
    or the text that is there already; OSError for the disk.
    """
    corpus = corpus_for(config.data, load_tokenizer(config.drafter.target))
    write_splits(config, splits_of(config, corpus), weights_sha256(config.drafter.target), on_progress)


def splits_of(config: DrafterConfig, corpus: Corpus) -> dict[str, Split]:
    """Prompts and sampling of each split that the target writes."""
    section = config.drafter
    seed = config.run.seed if section.text_seed is None else section.text_seed
    greedy = Sampling(config.data.sequence_length - section.prompt_length)
    heldout_NP = cut_prompts(corpus.heldout, section.num_eval_sequences, section.prompt_length, seed, EVAL_PROMPTS)
    splits = {"heldout": Split(heldout_NP, greedy)}
    if section.written_fraction > 0:
        train_NP = cut_prompts(corpus.train, section.num_sequences, section.prompt_length, seed, TRAIN_PROMPTS)
        sampling = replace(greedy, temperatures=section.temperatures, top_p=section.top_p, seed=seed)
        splits["train"] = Split(train_NP, sampling)
    return splits


def write_splits(
    config: DrafterConfig,
    splits: dict[str, Split],
    target_sha256: str,
    on_progress: OnProgress | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """This rank's part of all splits, with one engine, and one count over all of them."""
    done = {name: 0 for name in splits}
    total = sum(num_sequences_of(len(split.prompts_NP), rank, world_size) for split in splits.values())
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
        continue_prompts(path, engine, target_sha256, split.prompts_NP, split.sampling, rank, world_size, advance)


def read_split(config: DrafterConfig, name: str, split: Split, target_sha256: str) -> WrittenText:
    """What `write_splits` wrote. Raises ValueError where it is missing, corrupt or made with other settings."""
    ids_NT = load_text(text_path(config) / name, target_sha256, split.prompts_NP, split.sampling)
    return WrittenText.of_continuations(ids_NT, config.drafter.prompt_length)


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

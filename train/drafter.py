"""Train a DFlash drafter for one target: features online, labels from text the target wrote.

The target is the model that will be served, quantized experts and all. Before the first step it continues prompts from
the training documents through the engine (kept on disk, see `selftext`); training windows are those sequences mixed
with corpus windows. The frozen target computes the features of the step's windows (`frozen_target`), and the drafter is
trained on blocks that start at random anchors: a function of (seed, example number), like everything else in a batch.

Evaluation is no proxy. Greedy text does not depend on the drafter, so on held-out text that the target wrote greedily
the leading runs at all anchors give the very rounds that decoding would make, up to the dtype of the features. The
engine confirms the number once, on the exported drafter.

Left out: distillation from the target's logits.

Shape suffixes: B windows, T positions, A blocks a window, J = block size - 1 predicted offsets, C = taps * hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from speedstack.dflash.accept import leading_run, walk_rounds
from speedstack.dflash.block import block_mask, document_ids, make_blocks, sample_anchors
from speedstack.dflash.checkpoint import save_drafter
from speedstack.dflash.config import DFlashConfig, default_target_layer_ids
from speedstack.dflash.loss import BlockLoss, block_loss
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.acceptance import measure_acceptance
from speedstack.eval.results import AcceptanceResult
from speedstack.quant.checkpoint import weights_sha256
from speedstack.runtime import Engine
from speedstack.train.checkpoint import write_atomically
from speedstack.train.config import DrafterConfig
from speedstack.train.corpus import Corpus, corpus_for
from speedstack.train.data import PackedWindows, generator
from speedstack.train.distributed import World
from speedstack.train.frozen_target import FrozenTarget
from speedstack.train.loop import Recipe, RunResult, run
from speedstack.train.precision import resolve_precision
from speedstack.train.qat import load_tokenizer
from speedstack.train.selftext import Sampling, continue_prompts, cut_prompts, load_text, num_sequences_of

# First keys of the random generators, so that no two uses share numbers.
_TRAIN_PROMPTS, _EVAL_PROMPTS, _ORDER, _ANCHORS = range(4)
_EVAL_SEQUENCES_AT_ONCE = 4
_MAX_LAYERS_ALL_TAPPED = 8


@dataclass(frozen=True)
class Windows:
    """Training windows: tokens, their documents, and what may be a label there; and the anchors of their blocks."""

    ids_BT: Tensor
    documents_BT: Tensor
    predictable_BT: Tensor
    anchors_BA: Tensor
    real_BA: Tensor

    def to(self, device: torch.device) -> Windows:
        return Windows(*(tensor.to(device) for tensor in vars(self).values()))


class DrafterRecipe(Recipe):
    """The drafter's part of the training loop; see `speedstack.train.loop.Recipe`."""

    name = "drafter"

    def __init__(self, config: DrafterConfig, show_progress: bool = True) -> None:
        self.config = config
        self.show_progress = show_progress

    def inputs(self) -> dict[str, str]:
        return {"target": weights_sha256(self.config.drafter.target)}

    def build(self, world: World) -> nn.Module:
        section = self.config.drafter
        self.device = world.device
        self.target_sha256 = weights_sha256(section.target)
        dtype = resolve_precision(section.target_dtype, world.device)
        self.target = FrozenTarget(section.target, world.device, dtype)
        with world.main_first():
            corpus = corpus_for(self.config.data, load_tokenizer(section.target))
        self.separator_id = int(corpus.tokenizer.eos_token_id)
        self.draft_config = draft_config(
            self.config, self.target.config, corpus.tokenizer.mask_token_id, self.target_sha256
        )
        self.target.tap(self.draft_config.target_layer_ids)
        self.corpus = PackedWindows(corpus.train, self.config.data.sequence_length)
        texts = _texts(self.config, corpus)
        with tqdm(
            desc="writing text", unit="seq", leave=False, disable=not (self.show_progress and world.is_main)
        ) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            _write(self.config, texts, self.target_sha256, advance, world.rank, world.size)
        world.barrier()
        sequences = {
            split: load_text(_text_path(self.config) / split, self.target_sha256, prompts_NP, sampling)
            for split, (prompts_NP, sampling) in texts.items()
        }
        self.eval_ids_NT = sequences["heldout"]
        self.written_ids_NT = sequences.get("train", self.eval_ids_NT[:0])
        if section.precomputed_features_gib:
            self.target.precompute(self.written_ids_NT, int(section.precomputed_features_gib * 2**30))
        model = DFlashDraftModel(self.draft_config)
        model.init_weights(self.config.run.seed)
        return model.to(world.device)

    def batch(self, indices: Sequence[int]) -> Windows:
        """Windows of the examples with these numbers: written ones spread evenly among those of the corpus."""
        fraction = self.config.drafter.written_fraction
        windows = []
        for index in indices:
            num_written = int((index + 1) * fraction)
            if num_written > int(index * fraction):
                windows.append(self._written_window(num_written - 1, index))
            else:
                windows.append(self._corpus_window(index - num_written, index))
        columns = zip(*(vars(window).values() for window in windows), strict=True)
        return Windows(*(torch.cat(column) for column in columns)).to(self.device)

    def loss(self, model: Callable[..., Any], batch: Windows) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy of the blocks; metrics: share of right tokens right after an anchor, mean tau."""
        result, valid_AJ = self._blocks_loss(model, batch)
        with torch.no_grad():
            whole_A = valid_AJ.all(-1)
            num_whole = whole_A.sum().clamp_min(1)
            metrics = {
                "first_accuracy": result.correct_AJ[:, 0].sum() / valid_AJ[:, 0].sum().clamp_min(1),
                "block_acceptance": 1 + (leading_run(result.correct_AJ) * whole_A).sum() / num_whole,
            }
        return result.loss, metrics

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss at all anchors of held-out text the target wrote greedily, and the acceptance length decoding it has."""
        section = self.config.drafter
        length = self.config.data.sequence_length
        anchors = torch.arange(section.prompt_length, length - section.block_size + 1)
        total_loss, rounds, accepted = 0.0, [], torch.zeros(section.block_size - 1, dtype=torch.float64)
        for ids_BT in self.eval_ids_NT.split(_EVAL_SEQUENCES_AT_ONCE):
            anchors_BA = anchors.expand(len(ids_BT), -1)
            everything = torch.ones_like(ids_BT, dtype=torch.bool)
            windows = Windows(
                ids_BT, torch.zeros_like(ids_BT), everything, anchors_BA, torch.ones_like(anchors_BA, dtype=torch.bool)
            )
            result, _ = self._blocks_loss(model, windows.to(self.device))
            total_loss += float(result.loss) * len(ids_BT)
            for runs in leading_run(result.correct_AJ).view(len(ids_BT), -1).tolist():
                committed = walk_rounds(runs)
                rounds += committed
                for j in range(section.block_size - 1):
                    accepted[j] += sum(tokens > j + 1 for tokens in committed)
        metrics = {"heldout_loss": total_loss / len(self.eval_ids_NT), "acceptance_length": sum(rounds) / len(rounds)}
        survival = (accepted / len(rounds)).tolist()
        return metrics | {f"accepted_at_{j + 1}": share for j, share in enumerate(survival)}

    def export(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, DFlashDraftModel)
        save_drafter(model, path, getattr(torch, self.config.drafter.export_dtype))

    def _blocks_loss(self, model: Callable[..., Any], windows: Windows) -> tuple[BlockLoss, Tensor]:
        """The loss of all blocks of `windows`, and which of their positions [B * A, J] count."""
        section, config = self.config.drafter, self.draft_config
        blocks = make_blocks(
            windows.ids_BT,
            windows.documents_BT,
            windows.predictable_BT,
            windows.anchors_BA,
            windows.real_BA,
            config.block_size,
            config.mask_token_id,
        )
        positions_BT = torch.arange(windows.ids_BT.shape[1], device=self.device).expand_as(windows.ids_BT)
        hidden_BQD = model(
            self.target.features(windows.ids_BT),
            positions_BT,
            nn.functional.embedding(blocks.input_ids_BQ, self.target.embedding_VD),
            blocks.positions_BQ,
            block_mask(windows.documents_BT, windows.anchors_BA, config.block_size),
        )
        hidden_AJD = hidden_BQD.unflatten(1, (-1, config.block_size)).flatten(0, 1)[:, 1:]
        valid_AJ = blocks.weight_BAK.flatten(0, 1)[:, 1:]
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        result = block_loss(
            hidden_AJD,
            blocks.labels_BAK.flatten(0, 1)[:, 1:],
            valid_AJ,
            self.target.head_VD(dtype),
            section.gamma,
            section.weighting,
        )
        return result, valid_AJ

    def _written_window(self, place: int, index: int) -> Windows:
        """Window `place` of the endless stream of written text; its labels are the target's own tokens only."""
        epoch, within = divmod(place, len(self.written_ids_NT))
        rng = generator(self.config.run.seed, _ORDER, epoch)
        row = int(torch.randperm(len(self.written_ids_NT), generator=rng)[within])
        ids_BT = self.written_ids_NT[row : row + 1]
        predictable_BT = torch.arange(ids_BT.shape[1])[None] >= self.config.drafter.prompt_length
        # One document, end-of-text or not: in serving the context is never cut either.
        return self._with_anchors(ids_BT, torch.zeros_like(ids_BT), predictable_BT, index)

    def _corpus_window(self, place: int, index: int) -> Windows:
        ids_BT = self.corpus.examples(self.config.run.seed, [place])
        everything = torch.ones_like(ids_BT, dtype=torch.bool)
        return self._with_anchors(ids_BT, document_ids(ids_BT, self.separator_id), everything, index)

    def _with_anchors(self, ids_BT: Tensor, documents_BT: Tensor, predictable_BT: Tensor, index: int) -> Windows:
        rng = generator(self.config.run.seed, _ANCHORS, index)
        anchors_BA, real_BA = sample_anchors(documents_BT, predictable_BT, self.config.drafter.num_anchors, rng)
        return Windows(ids_BT, documents_BT, predictable_BT, anchors_BA, real_BA)


def draft_config(
    config: DrafterConfig, target_config: Any, tokenizer_mask_id: int | None, target_sha256: str
) -> DFlashConfig:
    """The drafter's shape for a target with the transformers config `target_config`.

    Raises ValueError when no mask token is known or a tapped layer does not exist.
    """
    section = config.drafter
    mask_token_id = tokenizer_mask_id if section.mask_token_id is None else section.mask_token_id
    if mask_token_id is None:
        raise ValueError("the target's tokenizer has no mask token: set drafter.mask_token_id to an unused id")
    num_target_layers = target_config.num_hidden_layers
    return DFlashConfig(
        hidden_size=target_config.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        vocab_size=target_config.vocab_size,
        mask_token_id=mask_token_id,
        target_layer_ids=section.target_layer_ids or _default_layer_ids(num_target_layers),
        num_target_layers=num_target_layers,
        block_size=section.block_size,
        rope_theta=section.rope_theta,
        max_position_embeddings=target_config.max_position_embeddings,
        target_sha256=target_sha256,
    )


def _default_layer_ids(num_target_layers: int) -> tuple[int, ...]:
    """All layers of a small target, whose features cost next to nothing; z-lab's five of a large one."""
    if num_target_layers <= _MAX_LAYERS_ALL_TAPPED:
        return tuple(range(num_target_layers))
    return default_target_layer_ids(num_target_layers, 5)


def train_drafter(
    config: DrafterConfig, on_step: Callable[[int, int, dict[str, float]], None] | None = None
) -> RunResult:
    """Train, export, and confirm the acceptance length with the engine on the held-out prompts.

    A finished run is returned at once, an interrupted one resumes, its written text included. The engine's figures are
    in `metrics` as `engine_acceptance_length` and stay in `acceptance.json` of the run directory.

    Raises ValueError for a target, corpus, text or combination of settings that does not fit; OSError for the disk.
    """
    recipe = DrafterRecipe(config, show_progress=on_step is None)
    result = run(recipe, config, on_step)
    file = result.path / "acceptance.json"
    if not file.is_file() and int(os.environ.get("RANK", "0")) == 0:
        engine = _engine(config, result.export_path)
        corpus = corpus_for(config.data, load_tokenizer(config.drafter.target))
        prompts_NP, sampling = _texts(config, corpus)["heldout"]
        measured = measure_acceptance(engine, {"held-out": prompts_NP.tolist()}, sampling.num_new_tokens)
        write_atomically(file, measured.model_dump_json(indent=2) + "\n")
    if file.is_file():
        measured = AcceptanceResult.model_validate_json(file.read_text(encoding="utf-8"))
        result.metrics["engine_acceptance_length"] = measured.overall.acceptance_length
    return result


def write_text(config: DrafterConfig, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Write, or complete, the text that training and evaluation of `config` read; `train_drafter` then finds it there.

    `on_progress(done, total)` counts sequences. Raises as `train_drafter`.
    """
    corpus = corpus_for(config.data, load_tokenizer(config.drafter.target))
    _write(config, _texts(config, corpus), weights_sha256(config.drafter.target), on_progress)


def _texts(config: DrafterConfig, corpus: Corpus) -> dict[str, tuple[Tensor, Sampling]]:
    """Prompts and sampling of each split that the target writes."""
    section, seed = config.drafter, config.run.seed
    greedy = Sampling(config.data.sequence_length - section.prompt_length)
    heldout_NP = cut_prompts(corpus.heldout, section.num_eval_sequences, section.prompt_length, seed, _EVAL_PROMPTS)
    texts = {"heldout": (heldout_NP, greedy)}
    if section.written_fraction > 0:
        train_NP = cut_prompts(corpus.train, section.num_sequences, section.prompt_length, seed, _TRAIN_PROMPTS)
        texts["train"] = (
            train_NP,
            replace(greedy, temperatures=section.temperatures, top_p=section.top_p, seed=seed),
        )
    return texts


def _write(
    config: DrafterConfig,
    texts: dict[str, tuple[Tensor, Sampling]],
    target_sha256: str,
    on_progress: Callable[[int, int], None] | None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """This rank's part of all splits, with one engine, and one count over all of them."""
    done = {split: 0 for split in texts}
    totals = {split: num_sequences_of(len(texts[split][0]), rank, world_size) for split in texts}
    engines: list[Engine] = []

    def engine() -> Engine:
        if not engines:
            engines.append(_engine(config))
        return engines[0]

    for split, (prompts_NP, sampling) in texts.items():

        def advance(num: int, split: str = split) -> None:
            done[split] = num
            if on_progress is not None:
                on_progress(sum(done.values()), sum(totals.values()))

        path = _text_path(config) / split
        continue_prompts(path, engine, target_sha256, prompts_NP, sampling, rank, world_size, advance)


def _text_path(config: DrafterConfig) -> Path:
    return config.drafter.text or config.run_directory / "text"


def _engine(config: DrafterConfig, drafter: Path | None = None) -> Engine:
    """The engine that serves the target on the configured device."""
    section = config.drafter
    return Engine.from_pretrained(
        section.target,
        drafter=drafter,
        device=config.run.device,
        max_length=config.data.sequence_length,
        max_batch_size=section.generation_batch_size,
    )

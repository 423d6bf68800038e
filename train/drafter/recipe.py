"""Train a DFlash drafter for one target, on text the target wrote.

The target is the model that will be served, quantized experts and all. Its engine first continues prompts (`text.py`);
training windows mix that text with corpus windows. The frozen target gives their features (`frozen_target.py`), and
blocks start at random anchors, a function of (seed, example number).

Acceptance is measured twice at every evaluation: simulated on held-out greedy text (`evaluation.py`), and served, by
the engine on a few of the same prompts, greedily and at temperature 1. A difference shows a gap between training and
serving.

Shape suffixes: B windows, T positions, A blocks a window or in all, J proposals of a block, N sequences, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedstack.dflash.accept import leading_run
from speedstack.dflash.block import Blocks, layer_masks, make_blocks, sample_anchors
from speedstack.dflash.checkpoint import load_drafter, save_drafter
from speedstack.dflash.loss import ABSENT, BlockLoss, Objective, block_loss, offset_weights
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.results.speed import AcceptanceResult, AcceptanceSet
from speedstack.eval.speed.acceptance import measure_acceptance
from speedstack.quant.checkpoint import weights_sha256
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.digest import config_sha256, model_sha256
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine
from speedstack.runtime.model.loading import check_decodable
from speedstack.support.progress import counting_bar
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.batches import PackedWindows
from speedstack.train.core.distributed import World
from speedstack.train.core.loop import Recipe
from speedstack.train.core.precision import resolve_precision
from speedstack.train.core.rundir import has_begun
from speedstack.train.core.sharding import whole_weight
from speedstack.train.data.digest import corpus_digest
from speedstack.train.data.packing import WrittenText
from speedstack.train.drafter.card import training_card
from speedstack.train.drafter.evaluation import GreedyText, Simulated, simulate
from speedstack.train.drafter.features import (
    FeatureSettings,
    StoredFeatures,
    holds_final,
    make_way,
    windows_sha256,
    write_features,
)
from speedstack.train.drafter.frozen_target import Features, FrozenTarget, LoadTarget, gather_final
from speedstack.train.drafter.shape import draft_config
from speedstack.train.drafter.text import (
    describe_text,
    make_way_for,
    needed_corpus,
    read_split,
    serving_engine,
    splits_of,
    write_splits,
)
from speedstack.train.drafter.windows import Batch, StepWeights, Windows, WindowStream


class DrafterRecipe(Recipe):
    """The drafter's part of the training loop; see `speedstack.train.core.loop.Recipe`."""

    name = "drafter"

    def __init__(
        self, config: DrafterConfig, show_progress: bool = True, load_target: LoadTarget = FrozenTarget
    ) -> None:
        self.config = config
        self.show_progress = show_progress
        self._load_target = load_target
        section = config.drafter
        _check_zero_stage(config)
        self.objective = Objective(section.ce_weight, section.kl_weight, section.tv_weight)

    def inputs(self) -> dict[str, str]:
        # Before any work, because the engine writes text and confirms acceptance.
        check_decodable(self.config.drafter.target)
        return {"target": weights_sha256(self.config.drafter.target)}

    def read_inputs(self) -> dict[str, str]:
        digests = {"target config": config_sha256(self.config.drafter.target)}
        return digests | {"corpus": corpus_digest(self.config.data.corpus)} if self.has_corpus else digests

    def build(self, world: World) -> nn.Module:
        section = self.config.drafter
        self.device, self.world = world.device, world
        self.target_sha256 = weights_sha256(section.target)
        self.model_sha256 = model_sha256(section.target)
        self.target_dtype = resolve_precision(section.target_dtype, world.device)
        target_config = read_config(section.target)[0].get_text_config()
        tokenizer = load_tokenizer(section.target, target_config.vocab_size)
        with world.main_first():
            corpus = needed_corpus(self.config, tokenizer)
            splits = splits_of(self.config, tokenizer, corpus)
            make_way_for(self.config, splits, self.model_sha256)
        self.has_corpus = corpus is not None
        self.draft_config = draft_config(self.config, target_config, tokenizer.mask_token_id, self.target_sha256)
        length = self.config.data.sequence_length
        corpus_windows = None if corpus is None else PackedWindows(corpus.train, length)
        with self._bar("writing text", "seq") as show:
            write_splits(self.config, splits, self.model_sha256, show, world.rank, world.size)
        world.barrier()
        texts = {name: read_split(self.config, name, split, self.model_sha256) for name, split in splits.items()}
        # Not earlier: the engine that writes text holds the target too.
        self.target = self._load_target(section.target, world.device, self.target_dtype)
        self.features_path = section.features_path or self.config.run_directory / "features"
        needs_final = self.objective.is_soft or (section.features == "disk" and holds_final(self.features_path))
        self.target.tap(self.draft_config.target_layer_ids, with_final=needs_final)
        self.data_card = describe_text(self.config, splits)
        self.heldout = self._measurable(GreedyText.of_sequences(texts["heldout"]))
        self.by_document = section.prompts.source is not None
        self.written: WrittenText | None = None
        if "train" in texts:
            arrange = WrittenText.packed if self.by_document else WrittenText.of_continuations
            self.written = arrange(texts["train"], length)
            _check_anchors(self.written)
        separator_id = None if corpus is None else int(tokenizer.eos_token_id)
        self.windows = WindowStream(self.config, corpus_windows, self.written, separator_id)
        self._keep_features()
        self._heads: dict[torch.dtype, Tensor] = {}
        self._engine: Engine | None = None
        self._simulated: Simulated | None = None
        model = self.make_model().to(world.device)
        self._weights = StepWeights(self.windows, self.config.loop.batch_size, partial(self._weight, model))
        return model

    def make_model(self) -> nn.Module:
        """The freshly initialized drafter, on the CPU."""
        model = DFlashDraftModel(self.draft_config)
        model.init_weights(self.config.run.seed)
        if self.draft_config.mask_embedding:
            model.init_mask_embedding(self.target.embedding_VD.cpu())
        if self.draft_config.draft_vocab_size is not None:
            model.set_draft_vocab(
                self.windows.most_frequent(self.draft_config.draft_vocab_size, self.draft_config.vocab_size)
            )
        return model

    def batch(self, indices: Sequence[int]) -> Batch:
        """Windows of the examples with these numbers; written ones are spread evenly among corpus windows."""
        return Batch(self.windows.batch(indices).to(self.device), indices[0] // self.config.loop.batch_size)

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of the blocks; metrics: share of right tokens right after an anchor, mean tau.

        The mean over a step's batches is the loss over all its windows, which differ in tokens to predict. With
        D-PACE's weights, which depend on the drafter, that holds but for the confidence.
        """
        result, valid_AJ = self.blocks_loss(model, batch.windows)
        with torch.no_grad():
            whole_A = valid_AJ.all(-1)
            num_whole = whole_A.sum().clamp_min(1)
            metrics = {
                "first_accuracy": result.correct_AJ[:, 0].sum() / valid_AJ[:, 0].sum().clamp_min(1),
                "block_acceptance": 1 + (leading_run(result.correct_AJ) * whole_A).sum() / num_whole,
            }
        return result.loss * self._weights.share(batch), metrics

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Loss and simulated acceptance on held-out text, served acceptance on a few of its prompts; may be empty."""
        if not self.heldout.lengths:
            return {}
        simulated = self._simulated = self.simulate(model)
        num_served, num_proposals = self.config.drafter.num_served_prompts, self.draft_config.num_proposals
        metrics: dict[str, float | None] = {
            "heldout_loss": simulated.loss,
            "acceptance_length": simulated.acceptance_length(),
        }
        for j, share in enumerate(simulated.survival(num_proposals)):
            metrics[f"accepted_at_{j + 1}"] = share
        if num_served and isinstance(model, DFlashDraftModel):
            metrics["tau_simulated"] = simulated.acceptance_length(num_served)
            for name, temperature in (("tau_served", 0.0), ("tau_served_t1", 1.0)):
                served = self._served(model, name, temperature)
                metrics[name] = None if served is None else served.acceptance_length
                for j in range(num_proposals):
                    metrics[f"{name}_at_{j + 1}"] = None if served is None else served.survival[j]
        return metrics

    def _served(self, model: DFlashDraftModel, name: str, temperature: float) -> AcceptanceSet | None:
        """The result of `serve`, or None with a warning: no step depends on it."""
        try:
            served = self.serve(model, temperature)
            return None if served is None else served.overall
        except (ValueError, torch.OutOfMemoryError) as error:
            warnings.warn(f"{name} is not measured: {error}", stacklevel=2)
            return None

    def _measurable(self, heldout: GreedyText) -> GreedyText:
        """Held-out text without answers that cannot be measured."""
        kept = heldout.measurable()
        num_short = len(heldout.lengths) - len(kept.lengths)
        if num_short and self.world.is_main:
            of = f"{num_short} of {len(heldout.lengths)} held-out answers have less than 2 tokens"
            rest = "acceptance is measured on the others" if kept.lengths else "acceptance is not measured"
            warnings.warn(f"{of}, so that nothing is drafted there: {rest}", stacklevel=2)
        return kept

    def simulate(self, model: nn.Module, text: GreedyText | None = None) -> Simulated:
        """The loss, and the rounds of greedy decoding on `text` or the held-out text, without decoding."""
        text = self.heldout if text is None else text
        return simulate(text, lambda windows: self.blocks_loss(model, windows.to(self.device)))

    def serve(self, model: DFlashDraftModel, temperature: float) -> AcceptanceResult | None:
        """Acceptance of the running drafter on this process's prompts, decoded by the engine; None without any."""
        section, world = self.config.drafter, self.world
        share = self.heldout.prompts(section.num_served_prompts)[world.rank :: world.size]
        if not share:
            return None
        if self._engine is None:
            self._engine = serving_engine(self.config)
        self._engine.set_drafter(model)
        num_new_tokens = self.config.data.sequence_length - section.prompt_length
        return measure_acceptance(
            self._engine, {"held-out": share}, num_new_tokens, temperature, ignore_eos=not self.by_document
        )

    def export(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, DFlashDraftModel)
        save_drafter(model, path, getattr(torch, self.config.drafter.export_dtype), self.card(model))

    def card(self, model: DFlashDraftModel) -> dict[str, Any]:
        """Training facts for the model card, and acceptance on held-out text."""
        acceptance_length = None
        if self.heldout.lengths:
            simulated = self._simulated or self.simulate(model)  # the last evaluation is of the finished drafter
            acceptance_length = simulated.acceptance_length()
        return training_card(
            self.config, self.data_card, self.written, len(self.heldout.lengths), acceptance_length, self.by_document
        )

    def load_export(self, path: Path) -> nn.Module:
        """The model that `export` wrote, on this process's device."""
        return load_drafter(path, torch.float32).to(self.device)

    def blocks(self, windows: Windows) -> Blocks:
        """The blocks after the anchors of `windows`."""
        config = self.draft_config
        return make_blocks(
            windows.ids_BT,
            windows.documents_BT,
            windows.predictable_BT,
            windows.anchors_BA,
            windows.real_BA,
            config.block_size,
            config.mask_token_id,
            config.num_proposals,
        )

    def blocks_loss(self, model: Callable[..., Any], windows: Windows) -> tuple[BlockLoss, Tensor]:
        """The loss of all blocks of `windows`, and which proposals [A, J] count."""
        section, config = self.config.drafter, self.draft_config
        module = model if isinstance(model, DFlashDraftModel) else model.module  # type: ignore[attr-defined]
        blocks = self.blocks(windows)
        features = self.features(windows)
        positions_BT = torch.arange(windows.ids_BT.shape[1], device=self.device).expand_as(windows.ids_BT)
        hidden_BQD = model(
            features.taps_BTC,
            positions_BT,
            module.embed_block(blocks.input_ids_BQ, self.target.embedding_VD),
            blocks.positions_BQ,
            layer_masks(config, windows.documents_BT, windows.anchors_BA),
        )
        hidden_AKD = hidden_BQD.unflatten(1, (-1, config.block_size)).flatten(0, 1)
        markov = module.markov_head
        valid_AJ = blocks.valid_BAJ.flatten(0, 1)
        result = block_loss(
            hidden_AKD[:, module.hidden_slots],
            module.draft_ids(blocks.labels_BAJ.flatten(0, 1)),
            valid_AJ,
            self._head(module),
            section.gamma,
            section.weighting,
            self.objective,
            target_hidden_AJD=gather_final(features.final_BTD, blocks.before_BAJ),
            markov_AJR=None if markov is None else markov.markov_w1(blocks.previous_BAJ.flatten(0, 1)),
            markov_VR=None if markov is None else whole_weight(markov.markov_w2),
        )
        return result, valid_AJ

    def features(self, windows: Windows) -> Features:
        """The target's features of `windows`; documents do not see each other."""
        return self.target.features(windows.ids_BT, windows.documents_BT)

    def _weight(self, module: nn.Module, windows: Windows) -> Tensor:
        """Sum of the offset weights of all predictions in `windows`."""
        blocks = self.blocks(windows)
        counts_BAJ = blocks.valid_BAJ
        if self.draft_config.draft_vocab_size is not None:
            assert isinstance(module, DFlashDraftModel)
            counts_BAJ = counts_BAJ & (module.draft_ids(blocks.labels_BAJ) != ABSENT)
        return (counts_BAJ * offset_weights(counts_BAJ.shape[-1], self.config.drafter.gamma, self.device)).sum()

    def product_dtype(self) -> torch.dtype:
        """dtype of this step's products with the LM head."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32

    def _head(self, module: DFlashDraftModel) -> Tensor:
        """The LM head's rows for proposals, in this step's product dtype, made once."""
        dtype = self.product_dtype()
        if dtype not in self._heads:
            self._heads[dtype] = module.draft_head(self.target.head_VD(dtype))
        return self._heads[dtype]

    def _keep_features(self) -> None:
        """Compute the kept features that are missing."""
        section, world = self.config.drafter, self.world
        if section.features == "online" or self.written is None:
            return
        ids_NT, documents_NT = self.written.ids_NT, self.written.documents_NT
        if section.features == "memory":
            self.target.precompute(ids_NT, int(section.features_gib * 2**30), documents_NT)
            return
        settings = FeatureSettings(
            target_sha256=self.model_sha256,
            target_layer_ids=self.target.layer_ids,
            with_final=self.target.with_final,
            windows_sha256=windows_sha256(ids_NT, documents_NT),
            target_dtype=str(self.target_dtype).removeprefix("torch."),
            dtype=section.features_dtype,
        )
        if section.features_path is None and not has_begun(self.config.run_directory):
            with world.main_first():
                make_way(self.features_path, settings)
        with self._bar("computing features", "window") as show:
            write_features(
                self.features_path,
                ids_NT,
                settings,
                self.target.compute,
                world.rank,
                world.size,
                lambda done: show(done, len(ids_NT)),
                documents_NT,
            )
        world.barrier()
        self.target.keep(StoredFeatures(self.features_path, ids_NT, settings, documents_NT))

    def _bar(self, what: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return counting_bar(what, unit, self.show_progress and self.world.is_main)


def _check_anchors(text: WrittenText) -> None:
    """Refuse text without an anchor: its loss would be 0 in every step."""
    _, real_N1 = sample_anchors(text.documents_NT, text.predictable_NT, 1, torch.Generator())
    if not real_N1.any():
        raise ValueError("no block fits into the training text: every prompt and its answer have 2 tokens or less")


def _check_zero_stage(config: DrafterConfig) -> None:
    """Refuse options that read parameters outside the model's forward, where ZeRO-3 has gathered none."""
    if config.distributed.zero_stage < 3:
        return
    names = ("mask_embedding", "num_served_prompts")
    in_the_way = [name for name in names if getattr(config.drafter, name)]
    if in_the_way:
        raise ValueError(
            f"distributed.zero_stage 3 has no whole parameters for drafter.{', drafter.'.join(in_the_way)}: "
            "use stage 0 to 2, or turn them off"
        )

"""The autoregressive baseline's recipe: an EAGLE-3 style head on the data, labels and loss of the drafter's recipe.

The export is a result, not a drafter: no engine decodes with it. Acceptance is simulated on greedy text, which is
exact.

Shape suffixes: B windows, T positions, A blocks, J drafted tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from speedstack.dflash.eagle import EagleHead
from speedstack.dflash.loss import BlockLoss, block_loss
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.trainer import save_tensors
from speedstack.train.drafter.frozen_target import FrozenTarget, LoadTarget, gather_final
from speedstack.train.drafter.recipe import DrafterRecipe
from speedstack.train.drafter.windows import Windows

WEIGHTS_NAME = "eagle.safetensors"


class EagleRecipe(DrafterRecipe):
    """The baseline's part of the training loop. Raises ValueError for options that only block drafters have."""

    def __init__(
        self, config: DrafterConfig, show_progress: bool = True, load_target: LoadTarget = FrozenTarget
    ) -> None:
        super().__init__(config, show_progress, load_target)
        section = config.drafter
        options = (
            "sample_from_anchor",
            "markov_rank",
            "draft_vocab_size",
            "sliding_window",
            "attention_sinks",
            "attention_value_scale",
            "partial_rotary_factor",
            "mask_embedding",
        )
        given = [name for name in options if getattr(section, name) != type(section).model_fields[name].default]
        if given:
            raise ValueError(f"drafter.architecture eagle has no drafter.{', drafter.'.join(given)}")

    def make_model(self) -> nn.Module:
        model = EagleHead(self.draft_config)
        model.init_weights(self.config.run.seed)
        return model

    def blocks_loss(self, model: Callable[..., Any], windows: Windows) -> tuple[BlockLoss, Tensor]:
        section = self.config.drafter
        blocks = self.blocks(windows)
        features = self.features(windows)
        embeds_BTD = nn.functional.embedding(windows.ids_BT, self.target.embedding_VD)
        positions_T = torch.arange(windows.ids_BT.shape[1], device=self.device)
        # A filler block's anchor is 0, with nothing before it: position 1 stands in, and the block does not count.
        anchors_BA = windows.anchors_BA.clamp_min(1)
        documents_BA1 = windows.documents_BT.gather(1, anchors_BA)[..., None]
        visible_BAT = (positions_T < anchors_BA[..., None]) & (windows.documents_BT[:, None] == documents_BA1)
        visible_BAT |= positions_T == anchors_BA[..., None] - 1
        hidden_BAJD = model(
            features.taps_BTC,
            embeds_BTD.roll(-1, dims=1),  # the last position has no token after it, and no anchor reads it
            nn.functional.embedding(blocks.previous_BAJ, self.target.embedding_VD),
            anchors_BA,
            visible_BAT,
        )
        valid_AJ = blocks.valid_BAJ.flatten(0, 1)
        result = block_loss(
            hidden_BAJD.flatten(0, 1),
            blocks.labels_BAJ.flatten(0, 1),
            valid_AJ,
            self.target.head_VD(self.product_dtype()),
            section.gamma,
            section.weighting,
            self.objective,
            target_hidden_AJD=gather_final(features.final_BTD, blocks.before_BAJ),
        )
        return result, valid_AJ

    def export(self, model: nn.Module, path: Path) -> None:
        path.mkdir(parents=True)
        save_tensors(
            {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, path / WEIGHTS_NAME
        )

    def load_export(self, path: Path) -> nn.Module:
        model = EagleHead(self.draft_config)
        model.load_state_dict(load_file(path / WEIGHTS_NAME))
        return model.to(self.device)

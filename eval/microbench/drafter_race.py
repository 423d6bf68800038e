"""Contestants of the drafter benchmark: a training step of ours and of speculators, on the same random features.

Legend: B windows, T tokens, C tapped features, D hidden, V vocabulary, A anchors, Q block slots, J label offsets.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import torch

from speedstack.dflash.block import layer_masks, make_blocks, sample_anchors
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.loss import Objective, block_loss
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.results.microbench import Shape

Loss = Literal["ce", "kl"]
LOSSES: tuple[Loss, ...] = ("ce", "kl")
OBJECTIVES = {"ce": Objective(), "kl": Objective(ce=0.0, kl=1.0)}
PEER_LOSSES = {"ce": "ce", "kl": "kl_div"}
PEER_WAYS = (("sdpa", False), ("sdpa", True), ("eager", False))


SHAPES = (
    Shape(
        name="tiny",
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        num_taps=6,
        vocab_size=4096,
    ),
    Shape(
        name="larger",
        hidden_size=512,
        intermediate_size=1536,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_taps=5,
        vocab_size=16384,
        num_windows=4,
    ),
)


class Batch:
    """Random windows: tokens, tapped features, final hidden states, embedding and head."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (shape.num_windows, shape.length)
        self.ids_BT = torch.randint(3, shape.vocab_size, size, generator=generator)
        self.features_BTC = torch.randn(*size, shape.num_taps * shape.hidden_size, generator=generator)
        self.final_BTD = torch.randn(*size, shape.hidden_size, generator=generator)
        self.embedding_VD = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.1
        self.head_VD = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.05


def drafter_config(shape: Shape) -> DFlashConfig:
    return DFlashConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        mask_token_id=2,
        target_layer_ids=tuple(range(shape.num_taps)),
        num_target_layers=shape.num_taps,
        block_size=shape.block_size,
    )


Step = Callable[[int], None]


def our_step(shape: Shape, loss: Loss, batch: Batch) -> Step:
    """An optimizer step as in `speedstack.train.drafter.recipe`."""
    config = drafter_config(shape)
    model = DFlashDraftModel(config)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    documents_BT, everything_BT = torch.zeros_like(batch.ids_BT), torch.ones_like(batch.ids_BT, dtype=torch.bool)
    positions_BT = torch.arange(shape.length).expand_as(batch.ids_BT)

    def step(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        anchors_BA, real_BA = sample_anchors(documents_BT, everything_BT, shape.num_anchors, generator)
        blocks = make_blocks(
            batch.ids_BT, documents_BT, everything_BT, anchors_BA, real_BA, config.block_size, config.mask_token_id
        )
        hidden_BQD = model(
            batch.features_BTC,
            positions_BT,
            model.embed_block(blocks.input_ids_BQ, batch.embedding_VD),
            blocks.positions_BQ,
            layer_masks(config, documents_BT, anchors_BA),
        )
        window_B11 = torch.arange(shape.num_windows)[:, None, None]
        result = block_loss(
            hidden_BQD.unflatten(1, (-1, config.block_size)).flatten(0, 1)[:, model.hidden_slots],
            blocks.labels_BAJ.flatten(0, 1),
            blocks.valid_BAJ.flatten(0, 1),
            batch.head_VD,
            objective=OBJECTIVES[loss],
            target_hidden_AJD=batch.final_BTD[window_B11, blocks.before_BAJ].flatten(0, 1) if loss == "kl" else None,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(shape: Shape, loss: Loss, batch: Batch, attention: str, is_packed: bool) -> Step:
    """An optimizer step of speculators' DFlash model on the same features.

    speculators takes labels from the target's logits, so that `ce` computes them too.
    """
    from speculators import SpeculatorsConfig, VerifierConfig  # type: ignore[import-not-found]
    from speculators.losses import resolve_loss_config  # type: ignore[import-not-found]
    from speculators.models.dflash import DFlashSpeculatorConfig  # type: ignore[import-not-found]
    from speculators.models.dflash.core import DFlashDraftModel as Peer  # type: ignore[import-not-found]
    from speculators.proposals.greedy import GreedyTokenProposalConfig  # type: ignore[import-not-found]
    from transformers import Qwen3Config

    layer_config = Qwen3Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
    )
    layer_config._attn_implementation = attention
    verifier = tempfile.mkdtemp(prefix="speedstack-bench-")  # it looks there for the kind of final norm
    layer_config.save_pretrained(verifier)
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layer_config,
        draft_vocab_size=shape.vocab_size,
        block_size=shape.block_size,
        aux_hidden_state_layer_ids=list(range(1, shape.num_taps + 1)),
        mask_token_id=2,
        speculators_config=SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=shape.block_size - 1)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=verifier, architectures=["Qwen3ForCausalLM"]),
        ),
    )
    model: Any = Peer(config)
    shutil.rmtree(verifier)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(batch.embedding_VD)
        for linear in (model.lm_head, model.verifier_lm_head):
            linear.weight.copy_(batch.head_VD)
        model.verifier_norm.weight.fill_(1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    loss_config = resolve_loss_config(PEER_LOSSES[loss], "eager")  # its fused ones are Triton kernels
    documents_BT = torch.arange(shape.num_windows)[:, None].expand_as(batch.ids_BT)
    positions_BT = torch.arange(shape.length).expand_as(batch.ids_BT)
    parts = [slice(None)] if is_packed else [slice(row, row + 1) for row in range(shape.num_windows)]

    def step(index: int) -> None:
        torch.manual_seed(index)
        for rows in parts:
            ids_BT = batch.ids_BT[rows]
            _, value, _ = model(
                batch.features_BTC[rows].flatten(0, 1)[None],
                ids_BT.reshape(1, -1),
                torch.ones(1, ids_BT.numel()),
                batch.final_BTD[rows].flatten(0, 1)[None],
                documents_BT[rows].reshape(1, -1),
                positions_BT[rows].reshape(1, -1),
                loss_config=loss_config,
                max_anchors=shape.num_anchors * len(ids_BT),
            )
            (value / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step

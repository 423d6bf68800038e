"""Pretrain the model of record from scratch: next-token cross-entropy on packed windows of the corpus.

The model is transformers' MiMoV2FlashForCausalLM at a size that trains in minutes. Its tokenizer is trained on the same
documents.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM, PreTrainedTokenizerBase

from speedstack.eval.quality.divergence import token_nll
from speedstack.quant.experts import enable_autocast
from speedstack.train.config.recipes import ModelSection, PretrainConfig
from speedstack.train.core.attention import enable_blockwise_attention
from speedstack.train.core.batches import PackedWindows
from speedstack.train.core.distributed import World
from speedstack.train.core.loop import OnStep, Recipe, RunResult, run
from speedstack.train.core.objective import heldout_batches, next_token_cross_entropy
from speedstack.train.data.corpus import corpus_for
from speedstack.train.data.digest import corpus_digest

# Base of the rotary frequencies: large for global attention, small for a window.
_ROPE_THETA = {"full_attention": 5e5, "sliding_attention": 1e4}


class PretrainRecipe(Recipe):
    """Pretraining's part of the training loop; see `speedstack.train.core.loop.Recipe`."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def inputs(self) -> dict[str, str]:
        return {}

    def read_inputs(self) -> dict[str, str]:
        return {"corpus": corpus_digest(self.config.data.corpus)}

    def build(self, world: World) -> nn.Module:
        data = self.config.data
        if data.sequence_length > self.config.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {data.sequence_length} exceeds model.max_position_embeddings "
                f"{self.config.model.max_position_embeddings}"
            )
        with world.main_first():
            corpus = corpus_for(data)
        self.world = world
        self.tokenizer = corpus.tokenizer
        self.train = PackedWindows(corpus.train, data.sequence_length)
        self.heldout = PackedWindows(corpus.heldout, data.sequence_length)
        model = MiMoV2FlashForCausalLM(model_config(self.config.model, corpus.tokenizer))
        enable_autocast(model)
        enable_blockwise_attention(model, world.device)
        return nn.Module.to(model, world.device)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return self.train.examples(self.config.run.seed, indices).to(self.world.device)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return next_token_cross_entropy(model(input_ids=batch, use_cache=False).logits, batch), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        total, num_windows = 0.0, 0
        for ids_BT in heldout_batches(self.heldout, self.config, self.world):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            nll = token_nll(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
            total += nll.mean().item() * len(ids_BT)
            num_windows += len(ids_BT)
        return {"heldout_loss": total / num_windows}

    def export(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, MiMoV2FlashForCausalLM)
        exported = copy.deepcopy(model)
        for parameter in exported.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.config.model.export_dtype))
        # Not cast: transformers too loads the router's correction bias in float32.
        exported.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def model_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MiMoV2FlashConfig:
    """transformers' config for a geometry and a tokenizer."""
    rope_parameters = {
        layer_type: {
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": section.partial_rotary_factor,
        }
        for layer_type, theta in _ROPE_THETA.items()
    }
    value_width = section.num_attention_heads * section.v_head_dim
    return MiMoV2FlashConfig(
        vocab_size=len(tokenizer),
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        intermediate_size=section.intermediate_size,
        moe_intermediate_size=section.moe_intermediate_size,
        n_routed_experts=section.num_experts,
        num_experts_per_tok=section.num_experts_per_tok,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        v_head_dim=section.v_head_dim,
        attention_value_scale=(section.hidden_size / value_width) ** 0.5,
        sliding_window=section.sliding_window,
        max_position_embeddings=section.max_position_embeddings,
        rope_parameters=rope_parameters,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pretrain(config: PretrainConfig, on_step: OnStep | None = None) -> RunResult:
    """Pretrain to the end of `config`; exports a transformers directory with its tokenizer. Raises as `loop.run`."""
    return run(PretrainRecipe(config), config, on_step)

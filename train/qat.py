"""Quantization-aware training of the routed experts, distilled from the full-precision model (QAD).

The student is the model itself with its expert weights passed through MXFP4 in every forward; gradients reach the
float32 masters straight through. Its loss is the forward KL from the frozen full-precision model, over all positions of
plain corpus text: the aim is a quantized model that says what the original says, and next-token cross-entropy would
teach it something else. `qat.objective` has the alternatives for comparison. Evaluation before the first step is
post-training quantization, the baseline.

The export is packed: its dequantized experts are, bit for bit, the weights the student was evaluated with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speedstack.eval.divergence import token_kl, token_nll, top1_matches
from speedstack.quant.checkpoint import load_model, save_packed, weights_sha256
from speedstack.quant.experts import enable_autocast, enable_fake_quant, expert_parameters
from speedstack.train.attention import enable_blockwise_attention
from speedstack.train.config import QatConfig
from speedstack.train.corpus import corpus_for
from speedstack.train.data import PackedWindows
from speedstack.train.distributed import World
from speedstack.train.loop import OnStep, RunResult, run
from speedstack.train.objective import forward_kl, heldout_batches, next_token_cross_entropy


class QatRecipe:
    """Quantization-aware training's part of the training loop; see `speedstack.train.loop.Recipe`."""

    def __init__(self, config: QatConfig) -> None:
        self.config = config

    def inputs(self) -> dict[str, str]:
        return {"model": weights_sha256(self.config.qat.model)}

    def build(self, world: World) -> nn.Module:
        section, data = self.config.qat, self.config.data
        student = load_model(section.model)
        self.tokenizer = load_tokenizer(section.model)
        if len(self.tokenizer) > student.config.get_text_config().vocab_size:
            raise ValueError(
                f"the tokenizer of {section.model} has {len(self.tokenizer)} tokens, the model an embedding of "
                f"{student.config.get_text_config().vocab_size}: they do not belong together"
            )
        with world.main_first():
            corpus = corpus_for(data, self.tokenizer)
        self.world = world
        self.train = PackedWindows(corpus.train, data.sequence_length)
        self.heldout = PackedWindows(corpus.heldout, data.sequence_length)

        self.teacher = load_model(section.model, dtype=getattr(torch, section.teacher_dtype))
        enable_autocast(self.teacher)
        nn.Module.to(self.teacher.requires_grad_(False).eval(), world.device)

        enable_fake_quant(student, section.scale_rule)
        for model in (student, self.teacher):
            enable_blockwise_attention(model, world.device)
        if section.trainable == "experts":
            student.requires_grad_(False)
            for parameter in expert_parameters(student).values():
                parameter.requires_grad_(True)
        return nn.Module.to(student, world.device)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return self.train.examples(self.config.run.seed, indices).to(self.world.device)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        objective = self.config.qat.objective
        logits_BTV = model(input_ids=batch, use_cache=False).logits
        if objective == "ce":
            return next_token_cross_entropy(logits_BTV, batch), {}
        kl = forward_kl(self._teacher_logits(batch), logits_BTV)
        if objective == "kl":
            return kl, {}
        cross_entropy = next_token_cross_entropy(logits_BTV, batch)
        weight = self.config.qat.ce_weight
        return weight * cross_entropy + (1 - weight) * kl, {"kl": kl, "cross_entropy": cross_entropy}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        sums = dict.fromkeys(("heldout_loss", "heldout_kl", "heldout_top1_agreement"), 0.0)
        num_windows = 0
        for ids_BT in heldout_batches(self.heldout, self.config, self.world):
            teacher_BTV = self._teacher_logits(ids_BT)
            student_BTV = model(input_ids=ids_BT, use_cache=False).logits
            values = (
                token_nll(student_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()),
                token_kl(teacher_BTV.flatten(0, 1), student_BTV.flatten(0, 1)),
                top1_matches(teacher_BTV, student_BTV).double(),
            )
            for name, value in zip(sums, values, strict=True):
                sums[name] += value.mean().item() * len(ids_BT)
            num_windows += len(ids_BT)
        return {name: total / num_windows for name, total in sums.items()}

    def export(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, PreTrainedModel)
        save_packed(model, path, tokenizer=self.tokenizer, scale_rule=self.config.qat.scale_rule)

    @torch.no_grad()
    def _teacher_logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.teacher(input_ids=ids_BT, use_cache=False).logits


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory. Raises ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no tokenizer that can be read: {' '.join(str(error).split())}") from error


def qat(config: QatConfig, on_step: OnStep | None = None) -> RunResult:
    """Train to the end of `config`; the export is a packed MXFP4 directory with its tokenizer.

    Raises as `speedstack.train.loop.run`, and ValueError for a model directory that is missing, broken or has no
    routed experts that can be quantized.
    """
    return run(QatRecipe(config), config, on_step)

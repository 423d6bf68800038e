"""Quantization-aware training of the routed experts, distilled from the full-precision model (QAD).

The student is the model with its expert weights passed through MXFP4 in every forward; gradients reach the float32
masters straight through. The loss is the forward KL from the frozen full-precision model over all positions of corpus
text: next-token cross-entropy would teach something other than the original's predictions (`qat.objective` has it for
comparison). Evaluation before the first step is the baseline, post-training quantization: rounding, or the values of
`qat.start_from`. Values on the MXFP4 grid stay there under every scale rule, so a packed start is unchanged.

The export is packed; its dequantized experts equal, bit for bit, the evaluated weights. A family without a packed
format gets ordinary weights of the same values. All else is copied from the model's directory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.eval.quality.divergence import token_kl, token_nll, top1_matches
from speedstack.quant.checkpoint import can_be_packed, check_export, export_model, weights_sha256
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.digest import config_sha256
from speedstack.quant.checkpoint.files import checkpoint_directory
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.quant.experts import enable_autocast, enable_fake_quant, expert_parameters, router_parameters
from speedstack.quant.ptq import round_to_nearest
from speedstack.runtime.model.loading import warn_if_not_decodable
from speedstack.train.config.recipes import QatConfig
from speedstack.train.core.attention import enable_blockwise_attention
from speedstack.train.core.batches import PackedWindows
from speedstack.train.core.distributed import World
from speedstack.train.core.loop import OnStep, Recipe, RunResult, run
from speedstack.train.core.make_trainer import count_micro_batches
from speedstack.train.core.objective import forward_kl, heldout_batches, next_token_cross_entropy
from speedstack.train.core.precision import widened
from speedstack.train.core.sharding import load_for_stage, shard_frozen
from speedstack.train.data.corpus import corpus_for
from speedstack.train.data.digest import corpus_digest
from speedstack.train.qat.flips import FlipWatch

# Fields of a configuration that do not affect how the model computes.
_NO_ARCHITECTURE = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


class QatRecipe(Recipe):
    """Quantization-aware training's part of the training loop; see `speedstack.train.core.loop.Recipe`."""

    def __init__(self, config: QatConfig) -> None:
        self.config = config
        self.has_stepped = False

    def inputs(self) -> dict[str, str]:
        section = self.config.qat
        digests = {"model": weights_sha256(section.model)}
        return digests if section.start_from is None else digests | {"start_from": weights_sha256(section.start_from)}

    def read_inputs(self) -> dict[str, str]:
        return {
            "corpus": corpus_digest(self.config.data.corpus),
            "model config": config_sha256(self.config.qat.model),
        }

    def build(self, world: World) -> nn.Module:
        section, data, stage = self.config.qat, self.config.data, self.config.distributed.zero_stage
        _check_teacher(self.config, world)
        if section.start_from is not None:
            _check_same_architecture(section.model, section.start_from)
        vocab_size = read_config(section.model)[0].get_text_config().vocab_size
        self.tokenizer = load_tokenizer(section.model, vocab_size)
        with world.main_first():
            corpus = corpus_for(data, self.tokenizer)
        self.world = world
        self.train = PackedWindows(corpus.train, data.sequence_length)
        self.heldout = PackedWindows(corpus.heldout, data.sequence_length)

        student = load_for_stage(section.start_from or section.model, torch.float32, stage, world)
        self.teacher = load_for_stage(section.model, getattr(torch, section.teacher_dtype), stage, world)
        enable_autocast(self.teacher)
        nn.Module.to(self.teacher.requires_grad_(False).eval(), world.device)
        # Kept while the teacher is called: the engine's hooks gather its parameters.
        self._teacher_engine = shard_frozen(self.teacher, world) if stage == 3 else None

        is_packed = can_be_packed(student.config.model_type)
        world.on_main(lambda: check_export(student, section.model, is_packed))
        if not is_packed and world.is_main:
            warnings.warn(
                f"no packed format is known for {student.config.model_type}: the export will have its experts' MXFP4 "
                "values as ordinary numbers",
                stacklevel=2,
            )
        # Dampening acts in every backward, and an optimizer step has several.
        enable_fake_quant(student, section.scale_rule, section.dampening / count_micro_batches(self.config, world))
        for model in (student, self.teacher):
            enable_blockwise_attention(model, world.device)
        trained = _trained_names(student, section.trainable)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in trained)
        if section.activation_checkpointing:
            # The second name is from before transformers 5.23.
            enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        student = nn.Module.to(student, world.device)
        self.flips = FlipWatch(student, section.scale_rule) if section.look_every else None
        return student

    def set_training(self, module: nn.Module) -> None:
        # The teacher has no dropout or router noise, so the student has none either.
        module.eval()
        for submodule in module.modules():
            if getattr(submodule, "gradient_checkpointing", False):
                submodule.training = True  # not its children's; transformers checkpoints in training mode only

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
            # A bfloat16 teacher would differ from itself by as much as a good student does.
            with widened(self.teacher):
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
        # Weights that moved unseen may have flipped: no share is better than a wrong 0.
        is_seen = self.flips is not None and (self.flips.has_looked or not self.has_stepped)
        flips = self.flips.metrics() if self.flips is not None and is_seen else {}
        return {name: total / num_windows for name, total in sums.items()} | flips

    def after_step(self, num_steps_done: int) -> None:
        self.has_stepped = True
        if self.flips is not None and num_steps_done % self.config.qat.look_every == 0:
            self.flips.look()

    def state(self) -> dict[str, torch.Tensor]:
        return self.flips.state() if self.flips is not None else {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.has_stepped = True
        if self.flips is None:
            return
        try:
            self.flips.load_state(tensors)
        except ValueError as error:  # only statistics depend on them
            warnings.warn(f"{error}: flips between looks are counted anew", stacklevel=2)

    def export(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, PreTrainedModel)
        section, is_packed = self.config.qat, can_be_packed(model.config.model_type)
        if not is_packed:
            round_to_nearest(model, section.scale_rule)
        export_model(model, section.model, path, scale_rule=section.scale_rule if is_packed else None)

    @torch.no_grad()
    def _teacher_logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.teacher(input_ids=ids_BT, use_cache=False).logits


def _trained_names(student: PreTrainedModel, trainable: Literal["experts", "all_but_router", "all"]) -> set[str]:
    """State-dict names of the parameters that `qat.trainable` names."""
    if trainable == "experts":
        return set(expert_parameters(student))
    names = {name for name, _ in student.named_parameters()}
    return names - router_parameters(student).keys() if trainable == "all_but_router" else names


def _check_teacher(config: QatConfig, world: World) -> None:
    """Raise ValueError for a packed teacher, which leaves nothing to distil, and for windows beyond its positions.

    Warns if our engine will not decode the result.
    """
    section = config.qat
    model_config, codec = read_config(checkpoint_directory(section.model))
    if codec.is_packed and section.objective != "ce":
        raise ValueError(
            f"qat.model {section.model} has its experts in MXFP4 already, so that there is nothing to distil: give the "
            "model it was made from, and this one as qat.start_from; or set qat.objective ce"
        )
    max_length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and config.data.sequence_length > max_length:
        raise ValueError(
            f"data.sequence_length {config.data.sequence_length} exceeds the {max_length} positions of {section.model}"
        )
    if world.is_main:
        warn_if_not_decodable(model_config)


def _check_same_architecture(model: Path, start_from: Path) -> None:
    """Raise ValueError if the two configurations describe models that compute differently."""
    theirs, ours = (read_config(checkpoint_directory(path))[0].to_dict() for path in (start_from, model))
    different = sorted(
        key
        for key in theirs.keys() | ours.keys()
        if key not in _NO_ARCHITECTURE and not key.startswith("_") and theirs.get(key) != ours.get(key)
    )
    if different:
        key = "model_type" if "model_type" in different else different[0]
        raise ValueError(
            f"qat.start_from {start_from} is another architecture than qat.model {model}: {key} is "
            f"{theirs.get(key)!r} instead of {ours.get(key)!r}"
        )


def qat(config: QatConfig, on_step: OnStep | None = None) -> RunResult:
    """Train to the end of `config`; exports a packed MXFP4 directory with its tokenizer.

    Raises as `loop.run`, and ValueError for a model that is missing, broken or without quantizable routed experts.
    """
    return run(QatRecipe(config), config, on_step)

"""Configs of the training recipes: one pydantic model a recipe, made of shared sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from speedstack.support.config import Section, flat_config
from speedstack.support.digests import json_sha256
from speedstack.train.config.drafter import DrafterSection
from speedstack.train.config.precision import Precision

# Fields that may change between start and resume, because they do not affect what is trained.
_FREE_ON_RESUME = frozenset(
    {
        "run.name",
        "run.out",
        "run.wandb_mode",
        "data.max_unusable_fraction",
        "loop.log_every",
        "loop.eval_every",
        "loop.save_every",
        "loop.keep_checkpoints",
        "qat.look_every",
        "drafter.num_served_prompts",
        "drafter.prompts.max_unusable_fraction",
    }
)


class RunSection(Section):
    name: str = Field("run", min_length=1, description="Name of the run; its directory is <out>/<name>.")
    out: Path = Field(Path("runs"), description="Directory that holds run directories.")
    seed: int = Field(0, ge=0, description="Seed of the initial weights and of the data order.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to train on; auto takes CUDA if present."
    )
    precision: Precision = Field(
        "auto",
        description="Autocast dtype of matrix products; auto takes the faster one on the device. Master weights and "
        "optimizer state are float32.",
    )
    wandb_mode: Literal["disabled", "offline", "online"] = Field(
        "offline",
        description="Mirror metrics.jsonl, which is the record, to Weights & Biases; the environment variable "
        "WANDB_MODE=disabled turns it off everywhere.",
    )


class DistributedSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="DeepSpeed ZeRO stage, used under torchrun with 2 or more processes. Muon needs stage 0."
    )


class DataSection(Section):
    corpus: Path = Field(Path("runs/corpus"), description="Tokenized corpus; prepared there if it does not exist yet.")
    source: str = Field(
        "stdlib",
        description="Text to tokenize: stdlib (the interpreter's standard library), a .jsonl, .json, .parquet or .txt "
        "file, a directory of such files, or the name of a dataset on the Hugging Face Hub; with a column `text`.",
    )
    max_unusable_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Part of the source's rows that may have no text (null, missing, a number, a broken line); they "
        "are left out, and more of them end the job.",
    )
    vocab_size: int = Field(4096, ge=300, description="Vocabulary of the byte-level BPE tokenizer trained by pretrain.")
    heldout_fraction: float = Field(0.05, gt=0, lt=1, description="Fraction of the documents kept for evaluation.")
    split_seed: int = Field(0, ge=0, description="Seed of the split into training and held-out documents.")
    sequence_length: int = Field(256, ge=8, description="Tokens in one packed training window.")
    eval_sequences: int = Field(64, ge=1, description="Held-out windows read at each evaluation.")


class OptimSection(Section):
    name: Literal["muon", "adamw"] = Field(
        "muon",
        description="muon: Muon for hidden and expert matrices, AdamW for embeddings, LM head, router, norms and "
        "vectors. adamw: AdamW for everything.",
    )
    lr: float = Field(1e-2, gt=0, description="Peak learning rate (of the Muon matrices when name is muon).")
    adamw_lr: float = Field(3e-3, gt=0, description="Peak learning rate of the AdamW part when name is muon.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's exponential decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator offset.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of matrices; vectors are never decayed.")
    schedule: Literal["cosine", "wsd"] = Field(
        "wsd", description="Decay of the learning rate: cosine, or wsd (warm-up, stable, linear decay)."
    )
    warmup_fraction: float = Field(0.02, ge=0, lt=1, description="Fraction of the steps spent on linear warm-up.")
    decay_fraction: float = Field(0.4, ge=0, le=1, description="Fraction of the steps wsd spends on its decay.")
    final_lr_fraction: float = Field(0.0, ge=0, le=1, description="Learning rate at the last step as part of the peak.")
    grad_clip: float = Field(1.0, ge=0, description="Maximum global gradient norm; 0 turns clipping off.")

    @model_validator(mode="after")
    def _fractions_fit(self) -> OptimSection:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction must not exceed 1")
        return self


class LoopSection(Section):
    num_steps: int = Field(1000, ge=1, description="Optimizer steps; the learning-rate schedule ends there.")
    batch_size: int = Field(16, ge=1, description="Sequences in one optimizer step, over all devices.")
    micro_batch_size: int = Field(
        0, ge=0, description="Sequences in one forward pass on one device; 0 means all of its share at once."
    )
    log_every: int = Field(10, ge=1, description="Steps between two training lines in metrics.jsonl.")
    eval_every: int = Field(250, ge=0, description="Steps between two evaluations; 0 evaluates at the end only.")
    save_every: int = Field(250, ge=0, description="Steps between two checkpoints; 0 saves at the end only.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of newest complete checkpoints kept.")


class ModelSection(Section):
    """Geometry of the model that pretrain builds: MiMoV2FlashForCausalLM, layer 0 dense, the others experts."""

    hidden_size: int = Field(256, ge=32, description="Width of the residual stream.")
    num_hidden_layers: int = Field(
        6, ge=2, description="Layers; attention is global in layer 0 and in every sixth one."
    )
    intermediate_size: int = Field(768, ge=32, description="Width of the dense MLP of layer 0.")
    moe_intermediate_size: int = Field(128, ge=32, description="Width of one routed expert.")
    num_experts: int = Field(16, ge=1, description="Routed experts in each layer but the first.")
    num_experts_per_tok: int = Field(4, ge=1, description="Routed experts each token is sent to.")
    num_attention_heads: int = Field(8, ge=1, description="Query heads.")
    num_key_value_heads: int = Field(
        2, ge=1, description="Key/value heads of global layers; sliding layers have twice it."
    )
    head_dim: int = Field(48, ge=8, description="Width of a query or key head.")
    v_head_dim: int = Field(32, ge=8, description="Width of a value head.")
    partial_rotary_factor: float = Field(0.5, gt=0, le=1, description="Part of head_dim that is rotated.")
    sliding_window: int = Field(64, ge=1, description="Tokens a sliding-window layer sees, the query's own included.")
    max_position_embeddings: int = Field(2048, ge=8, description="Longest sequence the model is declared for.")
    export_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the exported weights.")

    @model_validator(mode="after")
    def _geometry_fits(self) -> ModelSection:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError("num_experts_per_tok must not exceed num_experts")
        if self.num_attention_heads % (2 * self.num_key_value_heads):
            raise ValueError(
                "num_attention_heads must be a multiple of twice num_key_value_heads (sliding layers have twice)"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 32:
                raise ValueError(f"{name} must be a multiple of 32, the block size of MXFP4")
        return self


class QatSection(Section):
    model: Path = Field(
        Path("runs/pretrain-tiny/export"),
        description="Full-precision model directory: the teacher, and where the student starts without start_from.",
    )
    start_from: Path | None = Field(
        None,
        description="Directory of the same architecture, packed or not, whose values the student starts from, such as "
        "what `speedstack quantize` wrote; None: those of model.",
    )
    objective: Literal["kl", "ce", "mix"] = Field(
        "kl", description="kl: forward KL to the full-precision model; ce: next-token cross-entropy; mix: both."
    )
    ce_weight: float = Field(0.1, ge=0, le=1, description="Weight of cross-entropy in mix; KL has 1 - ce_weight.")
    trainable: Literal["experts", "all_but_router", "all"] = Field(
        "experts", description="Parameters that are trained; the router is what chooses each token's experts."
    )
    scale_rule: Literal["floor", "rceil", "even", "mse"] = Field(
        "even", description="Rule that chooses the shared exponent of an MXFP4 block."
    )
    teacher_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype the frozen teacher is held in; bfloat16 halves its memory, and rounds weights stored in "
        "float32. Evaluation computes in float32 either way.",
    )
    dampening: float = Field(
        0.0, ge=0, description="Pull of the masters to their MXFP4 values, against oscillation; 0 is none."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep one activation a layer for the backward and compute the rest again: less memory, slower.",
    )
    look_every: int = Field(
        10, ge=0, description="Steps between two looks at which masters changed their MXFP4 value; 0 looks at none."
    )

    @model_validator(mode="after")
    def _weight_is_used(self) -> QatSection:
        if self.objective != "mix" and self.ce_weight != QatSection.model_fields["ce_weight"].default:
            raise ValueError(f"ce_weight {self.ce_weight} is for objective mix: {self.objective} has no such weight")
        return self


class JobConfig(Section):
    """What every recipe shares. Subclasses add `kind` and their own section."""

    run: RunSection = Field(RunSection(), description="Where and how the job runs.")
    data: DataSection = Field(DataSection(), description="Corpus and windows.")
    optim: OptimSection = Field(OptimSection(), description="Optimizer and learning-rate schedule.")
    loop: LoopSection = Field(LoopSection(), description="Steps, batches, logging and checkpoints.")
    distributed: DistributedSection = Field(DistributedSection(), description="More than one device.")

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> JobConfig:
        if self.loop.micro_batch_size and self.loop.batch_size % self.loop.micro_batch_size:
            raise ValueError("loop.batch_size must be a multiple of loop.micro_batch_size")
        return self

    @property
    def run_directory(self) -> Path:
        """Directory of this run, `<run.out>/<run.name>`."""
        return self.run.out / self.run.name


class PretrainConfig(JobConfig):
    """Pretrain the model of record from scratch."""

    kind: Annotated[Literal["pretrain"], tyro.conf.Suppress] = Field("pretrain", description="The recipe.")
    run: RunSection = Field(RunSection(name="pretrain-tiny"), description="Where and how the job runs.")
    model: ModelSection = Field(ModelSection(), description="Geometry of the model.")


class QatConfig(JobConfig):
    """Quantization-aware training of the experts, distilled from the full-precision model."""

    kind: Annotated[Literal["qat"], tyro.conf.Suppress] = Field("qat", description="The recipe.")
    run: RunSection = Field(RunSection(name="qat-tiny"), description="Where and how the job runs.")
    qat: QatSection = Field(QatSection(), description="Objective and what is trained.")


class DrafterConfig(JobConfig):
    """Train a DFlash drafter for a target model."""

    kind: Annotated[Literal["drafter"], tyro.conf.Suppress] = Field("drafter", description="The recipe.")
    run: RunSection = Field(RunSection(name="drafter-tiny"), description="Where and how the job runs.")
    optim: OptimSection = Field(OptimSection(lr=3e-2, adamw_lr=3e-3), description="Optimizer and its schedule.")
    loop: LoopSection = Field(
        LoopSection(num_steps=600, batch_size=8), description="Steps, batches, logging and checkpoints."
    )
    drafter: DrafterSection = Field(DrafterSection(), description="The drafter and its objective.")

    @model_validator(mode="after")
    def _window_fits(self) -> DrafterConfig:
        needed = self.drafter.prompt_length + self.drafter.block_size
        if self.data.sequence_length < needed:
            raise ValueError(f"data.sequence_length must hold a prompt and a block: at least {needed} tokens")
        return self


KINDS: dict[str, type[JobConfig]] = {"pretrain": PretrainConfig, "qat": QatConfig, "drafter": DrafterConfig}


def identity(config: JobConfig) -> dict[str, Any]:
    """Every field that can change what a run trains, by dotted name."""
    return {key: value for key, value in flat_config(config).items() if key not in _FREE_ON_RESUME}


def config_hash(config: JobConfig) -> str:
    """SHA-256 of `identity(config)`."""
    return json_sha256(identity(config))

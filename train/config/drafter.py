"""The drafter's section of a config: geometry, training text and objective. The whole job is in `train.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from speedstack.eval.data.prompt_settings import PromptSettings
from speedstack.support.config import Section
from speedstack.train.config.precision import Precision


class PromptsSection(Section, PromptSettings):
    """Where prompts come from, if not from the corpus, and who answers them."""

    source: str | None = Field(
        None,
        description="A .jsonl, .json or .parquet file, a directory of such files, or the name of a dataset on the "
        "Hugging Face Hub, with a prompt in every row. None: prompts are pieces of the corpus.",
    )
    split: str = Field("train", min_length=1, description="Split of a dataset on the Hub; files have none.")
    as_chat: bool = Field(
        False, description="Text is a user's message: the target's chat template goes round it, as round messages."
    )
    responses: Literal["target", "given"] = Field(
        "target",
        description="target: the target answers, in place of the assistant's last message if there is one. given: the "
        "answers of the source are taken as they are, the last message or response_field; best written by the target.",
    )
    response_field: str = Field(
        "response", min_length=1, description="Field of given answers where the prompt is text, not messages."
    )
    heldout_source: str | None = Field(
        None, description="Prompts for evaluation, as source; None: a fraction of source, which is not trained on."
    )
    heldout_split: str | None = Field(None, description="Split of heldout_source; None: as split.")
    heldout_fraction: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Part of the rows whose prompts are held out, num_eval_sequences at most, without heldout_source.",
    )

    @model_validator(mode="after")
    def _needs_a_source(self) -> PromptsSection:
        given = sorted(self.model_fields_set - {"source"})
        unlike_default = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.source is None and unlike_default:
            raise ValueError(f"{', '.join(unlike_default)} needs source: without one prompts are pieces of the corpus")
        if self.heldout_split is not None and self.heldout_source is None:
            raise ValueError("heldout_split needs heldout_source")
        if self.heldout_source is not None and "heldout_fraction" in unlike_default:
            raise ValueError("heldout_fraction is of source: with heldout_source nothing of it is held out")
        if self.responses == "target" and "response_field" in unlike_default:
            raise ValueError("response_field has answers that are given: set responses to given")
        return self


class DrafterSection(Section):
    """The drafter's geometry, its training text and its objective. Hidden size and vocabulary are the target's."""

    architecture: Literal["dflash", "eagle"] = Field(
        "dflash",
        description="dflash: a block at once; eagle: the autoregressive baseline, which no engine decodes with.",
    )
    target: Path = Field(Path("runs/qat-tiny/export"), description="Model directory the drafter is trained for.")
    target_dtype: Precision = Field(
        "auto", description="dtype the frozen target computes the features in; auto takes the faster one on the device."
    )
    features: Literal["online", "memory", "disk"] = Field(
        "online",
        description="Context features of the written windows: computed in every step; or once before the first one, "
        "and kept in memory or in a directory of shards. A window takes T x (taps + 1) x hidden values.",
    )
    features_gib: float = Field(
        2.0,
        gt=0,
        description="Memory a process, in GiB, for features kept in memory; the rest is computed in each epoch.",
    )
    features_path: Path | None = Field(
        None, description="Directory of features kept on disk; None: inside the run directory."
    )
    features_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of features kept on disk.")
    block_size: int = Field(8, ge=2, description="Slots of a block: the anchor, then masks.")
    sample_from_anchor: bool = Field(
        False, description="The anchor's slot proposes too: as many proposals as slots, each one place earlier."
    )
    num_layers: int = Field(2, ge=1, description="Decoder layers of the drafter.")
    num_attention_heads: int = Field(8, ge=1, description="Query heads.")
    num_key_value_heads: int = Field(4, ge=1, description="Key/value heads.")
    head_dim: int = Field(32, ge=2, multiple_of=2, description="Width of a head.")
    intermediate_size: int = Field(512, ge=1, description="Width of the MLP.")
    rope_theta: float = Field(1e4, gt=0, description="Base of the rotary embedding.")
    target_layer_ids: tuple[int, ...] = Field(
        (),
        description="Target layers whose outputs are the context features; empty: all layers of a target of at most 8, "
        "five evenly spaced ones of a larger target.",
    )
    mask_token_id: int | None = Field(
        None, ge=0, description="Token that stands for a position to draft; None: the tokenizer's mask token."
    )
    mask_embedding: bool = Field(False, description="Masked slots have a learned embedding of their own, as MiMo's.")
    markov_rank: int = Field(
        0, ge=0, description="Rank of a head that corrects each proposal by the token before it (DSpark); 0 is none."
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Propose only so many tokens, those most frequent in the training text; None: all."
    )
    sliding_window: int | None = Field(
        None, ge=1, description="Tokens of the context a drafter layer sees, in every layer; None: all of them."
    )
    sliding_is_causal: bool = Field(True, description="Sliding-window layers see only earlier slots of their block.")
    attention_sinks: bool = Field(
        False, description="A learned logit a head in the softmax of the drafter's attention."
    )
    attention_value_scale: float = Field(1.0, gt=0, description="Factor on the drafter's attention values.")
    partial_rotary_factor: float = Field(1.0, gt=0, le=1, description="Share of a drafter head that is rotated.")
    num_anchors: int = Field(32, ge=1, description="Blocks trained in each window, at random places.")
    weighting: Literal["exponential", "dpace"] = Field(
        "exponential", description="Weight of an offset: exp(-(k - 1) / gamma), or D-PACE's confidence products."
    )
    gamma: float = Field(4.0, gt=0, description="Decay of the exponential weights; 4 suits blocks of 8.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy of the target's token in the loss.")
    kl_weight: float = Field(0.0, ge=0, description="Weight of the forward KL to the target's distribution.")
    tv_weight: float = Field(0.0, ge=0, description="Weight of the total variation from it; DSpark: 0.1 CE, 0.9 TV.")
    text: Path | None = Field(
        None, description="Directory of the text the target writes for training; None: inside the run directory."
    )
    text_seed: int | None = Field(
        None, ge=0, description="Seed of the prompts and of what is sampled after them; None: the run's seed."
    )
    prompts: PromptsSection = Field(PromptsSection(), description="Prompts from elsewhere than the corpus.")
    num_sequences: int = Field(
        512, ge=0, description="Sequences the target writes for training; of prompts with a source the most it answers."
    )
    num_eval_sequences: int = Field(32, ge=1, description="Greedy continuations of held-out prompts, for evaluation.")
    num_served_prompts: int = Field(
        4,
        ge=0,
        description="Held-out prompts that the engine decodes with the running drafter at each evaluation, greedily "
        "and at temperature 1; 0 decodes none until the end.",
    )
    prompt_length: int = Field(
        64,
        ge=1,
        description="Tokens of a prompt; the target fills the rest of the window. Of prompts with a source the most a "
        "prompt has, longer ones are left out, and an answer has at most the rest of the window.",
    )
    temperatures: tuple[float, ...] = Field(
        (0.0,), min_length=1, description="Sampling temperatures of the written text, in turn; 0 is greedy."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the sampling.")
    written_fraction: float = Field(
        0.9, ge=0, le=1, description="Part of the training windows that the target wrote; the rest is corpus."
    )
    generation_batch_size: int = Field(16, ge=1, description="Sequences the target writes together.")
    export_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the exported weights.")

    @model_validator(mode="after")
    def _geometry_fits(self) -> DrafterSection:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.written_fraction > 0 and not self.num_sequences:
            raise ValueError("written_fraction above 0 needs num_sequences above 0")
        if self.features != "online" and not self.written_fraction:
            raise ValueError("features are kept of written windows alone: set written_fraction above 0")
        if self.ce_weight + self.kl_weight + self.tv_weight == 0:
            raise ValueError("ce_weight, kl_weight and tv_weight are all 0: one has to be above")
        if self.prompts.responses == "given" and (any(self.temperatures) or self.top_p != 1):
            raise ValueError("temperatures and top_p are of answers that the target writes: prompts.responses is given")
        if self.top_p != 1 and not any(self.temperatures):
            raise ValueError("top_p is for temperatures above 0, and there is none")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError("temperatures must not be negative")
        return self

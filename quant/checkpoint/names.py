"""A family's tensor names on disk and in its transformers model.

On disk every expert has three 2-D tensors, or a layer's are fused as in transformers. transformers' conversion table is
private and for dense tensors, so packable families are listed here; a test compares them with what the installed
`save_pretrained` writes. gpt-oss' experts are always fused on disk.
"""

import re
from dataclasses import dataclass, replace

import torch

MODEL_PREFIX = "model."


@dataclass(frozen=True)
class HubNames:
    """How the family `model_type` names its tensors on disk.

    gate, up, down: an expert's projections.
    renames: (part of transformers' name, part on disk), in order; released: more, from `save_pretrained`'s names to the
    makers'.
    is_fused: a layer's experts are one tensor, gate and up rows interleaved, contraction axis first.
    is_native: transformers' names and fused experts, as `save_original_format=False` writes them.
    """

    model_type: str = ""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    renames: tuple[tuple[str, str], ...] = ()
    released: tuple[tuple[str, str], ...] = ()
    is_fused: bool = False
    is_native: bool = False

    def of(self, native_name: str) -> str:
        """The name on disk of a module or a tensor that is no expert weight."""
        return _replace(native_name, self.renames)

    def as_released(self) -> "HubNames":
        """The names in the checkpoints of the family's makers."""
        return replace(self, renames=self.renames + self.released, released=())

    def as_native(self) -> "HubNames":
        """transformers' names; for families with fused, untransposed experts."""
        assert not self.is_fused
        return replace(self, renames=(), released=(), is_native=True)

    def as_written(self) -> "HubNames":
        """The names for writing: in all our formats each expert has its own tensors."""
        return hub_names(self.model_type) if self.is_native else self

    def parts(self, module: str, weight_name: str, index: int) -> list[str]:
        """Modules on disk of expert `index` of `module`, in transformers' row order."""
        leaves = {"gate_up_proj": [self.gate, self.up], "down_proj": [self.down]}[weight_name]
        return [f"{module}.{index}.{leaf}" for leaf in leaves]

    def split(self, weight_name: str, rows: torch.Tensor) -> list[torch.Tensor]:
        """One expert's rows [R, ...] in transformers' order, as gate and up, or as down."""
        if weight_name == "down_proj":
            return [rows]
        return [rows[0::2].contiguous(), rows[1::2].contiguous()] if self.is_fused else list(rows.chunk(2))

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        if len(parts) == 2 and self.is_fused:
            return torch.stack(parts, dim=1).flatten(0, 1)
        return torch.cat(parts)


def layer_index(module: str) -> int | None:
    """A module's decoder layer; None outside the layers, such as in a multi-token-prediction head."""
    match = re.match(r"(?:model\.)?layers\.(\d+)\.", module)
    return int(match[1]) if match else None


def _replace(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in renames:
        name = name.replace(old, new)
    return name


_DEEPSEEK_V4 = HubNames(
    gate="w1",
    up="w3",
    down="w2",
    renames=(
        (".self_attn.compressor.indexer.scorer.weights_proj.", ".attn.indexer.weights_proj."),
        (".self_attn.compressor.indexer.q_b_proj.", ".attn.indexer.wq_b."),
        (".self_attn.compressor.indexer.", ".attn.indexer.compressor."),
        (".self_attn.", ".attn."),
        (".compressor.gate_proj.", ".compressor.wgate."),
        (".kv_proj.", ".wkv."),
        (".kv_norm.", ".norm."),
        (".position_bias", ".ape"),
        (".q_a_proj.", ".wq_a."),
        (".q_b_proj.", ".wq_b."),
        (".o_a_proj.", ".wo_a."),
        (".o_b_proj.", ".wo_b."),
        (".q_a_norm.", ".q_norm."),
        (".sinks", ".attn_sink"),
        (".shared_experts.gate_proj.", ".shared_experts.w1."),
        (".shared_experts.down_proj.", ".shared_experts.w2."),
        (".shared_experts.up_proj.", ".shared_experts.w3."),
        (".gate.e_score_correction_bias", ".gate.bias"),
        (".mlp.", ".ffn."),
        (".input_layernorm.", ".attn_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        (".attn_hc.", ".hc_attn_"),
        (".ffn_hc.", ".hc_ffn_"),
        ("lm_head.", "head."),
    ),
    released=(
        ("model.embed_tokens.", "embed."),
        ("model.hc_head.hc_", "hc_head_"),
        (".attn.norm.", ".attn.kv_norm."),
        (MODEL_PREFIX, ""),
    ),
)

FAMILIES = {
    "deepseek_v2": HubNames(),
    "deepseek_v3": HubNames(),
    "deepseek_v4": _DEEPSEEK_V4,
    "glm4_moe": HubNames(),
    "gpt_oss": HubNames(is_fused=True),
    "mimo_v2_flash": HubNames(renames=((".self_attn.sinks", ".self_attn.attention_sink_bias"),)),
    "mixtral": HubNames(gate="w1", up="w3", down="w2", renames=((".mlp.", ".block_sparse_moe."),)),
    "olmoe": HubNames(),
    "qwen2_moe": HubNames(),
    "qwen3_moe": HubNames(),
}


def hub_names(model_type: str) -> HubNames:
    """The names of a family. Raises ValueError for an unknown one."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"the tensor names of model_type {model_type!r} are not known: choose a model of {', '.join(FAMILIES)}"
        )
    return replace(FAMILIES[model_type], model_type=model_type)

"""Tensor names of a family on disk, against the names of its transformers model.

On disk every expert has three 2-D tensors; transformers fuses them on loading. Its own table of these conversions is
private and bound to dense tensors, so the families we can pack are listed here, and a test compares each with what
`save_pretrained` of the installed transformers writes.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class HubNames:
    """gate, up, down: an expert's projections on disk; renames: (transformers' part of a name, the part on disk)."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    renames: tuple[tuple[str, str], ...] = ()

    def of(self, native_name: str) -> str:
        """The name on disk of a module or of a tensor that is not an expert weight."""
        for native, hub in self.renames:
            native_name = native_name.replace(native, hub)
        return native_name

    def of_expert(self, experts_name: str, weight_name: str, index: int) -> list[str]:
        """Modules on disk of expert `index`, in the order in which transformers stacks their rows."""
        parts = {"gate_up_proj": [self.gate, self.up], "down_proj": [self.down]}[weight_name]
        return [f"{self.of(experts_name)}.{index}.{part}" for part in parts]


_FAMILIES = {
    "deepseek_v2": HubNames(),
    "deepseek_v3": HubNames(),
    "glm4_moe": HubNames(),
    "mimo_v2_flash": HubNames(renames=((".self_attn.sinks", ".self_attn.attention_sink_bias"),)),
    "mixtral": HubNames("w1", "w3", "w2", renames=((".mlp.", ".block_sparse_moe."), (".mlp", ".block_sparse_moe"))),
    "olmoe": HubNames(),
    "qwen2_moe": HubNames(),
    "qwen3_moe": HubNames(),
}


def hub_names(config: PreTrainedConfig) -> HubNames:
    """Raises ValueError for a family whose names are not known, or whose experts the packed format cannot express."""
    if config.model_type == "gpt_oss":
        raise ValueError(
            "gpt-oss experts have biases and interleaved rows, which mxfp4-pack-quantized cannot express: "
            "save them with save_pretrained, or use gpt-oss' own MXFP4 format"
        )
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"the tensor names of model_type {config.model_type!r} are not known: "
            f"choose a model of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[config.model_type]

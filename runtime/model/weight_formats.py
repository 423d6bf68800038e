"""Storage formats of a model's weights, by part.

With MXFP4 experts, the other parts are most of what a step reads. FP8 is E4M3 with a float32 scale per 128 x 128 tile
(`quant/fp8.py`), MXFP4 blocks of 32 with a one-byte scale (`quant/mxfp4.py`). Joined matrices may have tiles of fewer
rows (`fp8.joined`, `grouped_fp8_qkv`); their extra scales, one byte in two thousand at 64 rows, are not counted. Other
formats of `quant/formats.py` can be planned, not served.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from speedstack.quant.formats import FORMATS
from speedstack.quant.fp8 import HEAD_FIELD

WeightFormat = Literal[
    "float32", "bf16", "fp8", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "nvfp4", "int4_g32", "int2_g32"
]
# Formats with another name in checkpoint configs.
_NAMES = {"fp8_block128": "fp8"}
BITS: dict[str, float] = {"float32": 32, "bf16": 16}
BITS |= {_NAMES.get(each.name, each.name): each.bits_per_weight for each in FORMATS.values()}
assert set(BITS) == set(get_args(WeightFormat))
# Module names that may stand in a list of unquantized modules.
_ATTENTION, _MLP = ("self_attn", "attn"), ("mlp", "ffn")


@dataclass(frozen=True)
class WeightFormats:
    """The format of each part. Norms, biases and sinks count as bf16."""

    attention: WeightFormat = "bf16"
    attention_output: WeightFormat = "bf16"
    dense: WeightFormat = "bf16"
    router: WeightFormat = "bf16"
    experts: WeightFormat = "bf16"
    embedding: WeightFormat = "bf16"
    lm_head: WeightFormat = "bf16"

    def num_bytes(self, part: str, num_weights: float) -> float:
        return num_weights * BITS[getattr(self, part)] / 8


def weight_format(number_format: str) -> WeightFormat:
    """This module's name for a format of `quant/formats.py`. Raises ValueError for an unknown one."""
    name = _NAMES.get(number_format, number_format)
    if name not in BITS:
        raise ValueError(f"the plan knows no number format {number_format!r}; known: {', '.join(BITS)}")
    return cast(WeightFormat, name)


def formats_from_fields(fields: dict[str, Any]) -> WeightFormats:
    """The weight formats that a config.json describes. Raises ValueError for an unknown quantization."""
    model_type = str(fields.get("model_type"))
    # MiMo's routers are float32 (MiMo-V2-Flash paper, section 2.1).
    router: WeightFormat = "float32" if model_type.startswith("mimo_v2") else "bf16"
    quantization = fields.get("quantization_config")
    if quantization is None:
        dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if dtype == "float32":
            return WeightFormats("float32", "float32", "float32", "float32", "float32", "float32", "float32")
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"weights of dtype {dtype!r} are not known to the plan; use bfloat16 or float32")
        return WeightFormats(router=router)
    if not isinstance(quantization, dict):
        raise ValueError("quantization_config is no object: download it again")
    method = quantization.get("quant_method")
    if method == "mxfp4" or (method == "compressed-tensors" and quantization.get("format") == "mxfp4-pack-quantized"):
        return WeightFormats(router=router, experts="mxfp4")
    if method == "fp8":
        expert_dtype = quantization.get("expert_dtype", fields.get("expert_dtype"))
        is_mxfp4 = quantization.get("store_dtype") == "mxfp4" or expert_dtype in ("fp4", "mxfp4")
        ignored = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
        if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
            raise ValueError(f"quantization_config lists no names of what is not quantized: {ignored!r}")
        paths = [path for name in ignored if _is_of_model(path := name.split("."), fields.get("num_hidden_layers"))]
        own = [path for path in paths if not any("expert" in segment for segment in path)]

        def of(modules: tuple[str, ...], *leaves: str) -> WeightFormat:
            """A part counts as FP8 only if all its matrices are; a name in the list covers everything below it."""
            is_ignored = any(
                path[-1].endswith(leaves) or path[-1] in modules or path[-2:-1] == ["layers"] for path in own
            )
            return "bf16" if is_ignored else "fp8"

        has_plain_experts = any("experts" in path for path in paths)
        return WeightFormats(
            attention=of(_ATTENTION, "q_proj", "k_proj", "v_proj", "qkv_proj"),
            attention_output=of(_ATTENTION, "o_proj"),
            dense=of(_MLP, "gate_proj", "up_proj", "down_proj"),
            router=router,
            experts="mxfp4" if is_mxfp4 else "bf16" if has_plain_experts else "fp8",
            lm_head="fp8" if quantization.get(HEAD_FIELD) else "bf16",
        )
    raise ValueError(f"quantization method {method!r} is not known to the plan; known: mxfp4, compressed-tensors, fp8")


def _is_of_model(path: Sequence[str], num_layers: int | None) -> bool:
    """Whether a module belongs to the model and not to a multi-token-prediction head."""
    numbers = [int(path[i + 1]) for i in range(len(path) - 1) if path[i] == "layers" and path[i + 1].isdigit()]
    is_beyond = num_layers is not None and any(number >= num_layers for number in numbers)
    return "mtp" not in path and not is_beyond

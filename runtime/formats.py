"""How many bits a model's weights take in memory, part by part.

With MXFP4 experts the other parts are most of what a step reads, so each is named. FP8 means E4M3 under one float32
scale a tile of 128 x 128 (`speedstack.quant.fp8`), MXFP4 blocks of 32 under one byte (`speedstack.quant.mxfp4`).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

WeightFormat = Literal["float32", "bf16", "fp8", "mxfp4"]
BITS: dict[str, float] = {"float32": 32, "bf16": 16, "fp8": 8 + 32 / 128**2, "mxfp4": 4 + 8 / 32}
assert set(BITS) == set(get_args(WeightFormat))


@dataclass(frozen=True)
class WeightFormats:
    """The format of each part. Norms, biases and sinks are counted as bf16."""

    attention: WeightFormat = "bf16"
    attention_output: WeightFormat = "bf16"
    dense: WeightFormat = "bf16"
    router: WeightFormat = "bf16"
    experts: WeightFormat = "bf16"
    embedding: WeightFormat = "bf16"
    lm_head: WeightFormat = "bf16"

    def num_bytes(self, part: str, num_weights: float) -> float:
        return num_weights * BITS[getattr(self, part)] / 8


def formats_from_fields(fields: dict[str, Any]) -> WeightFormats:
    """What a config.json says of its checkpoint's weights.

    Raises ValueError for a quantization it does not know, by name.
    """
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
    method = quantization.get("quant_method")
    if method == "mxfp4" or (method == "compressed-tensors" and quantization.get("format") == "mxfp4-pack-quantized"):
        return WeightFormats(router=router, experts="mxfp4")
    if method == "fp8":
        is_mxfp4 = "mxfp4" in (quantization.get("store_dtype"), fields.get("expert_dtype"))
        ignored = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
        return WeightFormats(
            attention="fp8",
            attention_output="bf16" if any("o_proj" in name for name in ignored) else "fp8",
            dense="fp8",
            router=router,
            experts="mxfp4" if is_mxfp4 else "fp8",
        )
    raise ValueError(f"quantization method {method!r} is not known to the plan; known: mxfp4, compressed-tensors, fp8")

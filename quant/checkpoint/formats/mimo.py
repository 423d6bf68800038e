"""Xiaomi's `store_dtype: mxfp4` (MiMo-V2.5-Pro-FP4-DFlash): an FP8 checkpoint whose routed experts are MXFP4.

Per expert projection `weight` uint8 [out, in / 2] and `weight_scale` uint8 [out, in / 32]. Other linear layers may be
FP8 in tiles of 128 x 128, `weight` and float32 `weight_scale_inv` (a multiplier, its name notwithstanding); attention's
output projections stay as they are, and `ignored_layers` lists everything that is not FP8. vLLM and SGLang read this
for MiMo models.
"""

from typing import Any, ClassVar

import torch

from speedstack.quant.checkpoint.formats.codec import FP8_FIELDS, PerExpert, check_tiles
from speedstack.quant.checkpoint.names import HubNames
from speedstack.quant.mxfp4 import BLOCK_SIZE


class MiMo(PerExpert):
    """quant_method fp8 with store_dtype mxfp4."""

    name: ClassVar[str] = "mimo"
    title: ClassVar[str] = "MiMo's store_dtype mxfp4"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    linear_scale: ClassVar[tuple[str, torch.dtype] | None] = ("weight_scale_inv", torch.float32)
    plain_linears: ClassVar[tuple[str, ...]] = ("o_proj",)

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") != "fp8" or quantization.get("store_dtype") != "mxfp4":
            return False
        check_tiles(quantization)
        if quantization.get("mxfp4_block_size", BLOCK_SIZE) != BLOCK_SIZE:
            size = quantization["mxfp4_block_size"]
            raise ValueError(f"mxfp4_block_size {size} is not MXFP4, whose blocks have {BLOCK_SIZE} elements")
        return True

    @staticmethod
    def caution(names: HubNames) -> str | None:
        if names.model_type.startswith("mimo"):
            return None
        return f"vLLM and SGLang read {MiMo.title} for MiMo models alone, not for {names.model_type}"

    def config(self, ignored: list[str]) -> dict[str, Any]:
        own = {"store_dtype": "mxfp4", "mxfp4_block_size": BLOCK_SIZE, "ignored_layers": ignored}
        return {"quantization_config": FP8_FIELDS | own}

"""DeepSeek-V4's FP4 experts: an FP8 checkpoint with E8M0 scales throughout.

Per expert projection `weight` int8 [out, in / 2] and `scale` float8_e8m0fnu [out, in / 32]; other linear layers may be
FP8 in tiles of 128 x 128, `weight` and `scale` of the same dtypes as DeepSeek's own. `expert_dtype: fp4` says so, in
quantization_config for transformers, which loads it for any family, and beside it in DeepSeek's own releases.
"""

from typing import Any, ClassVar

import torch

from speedstack.quant.checkpoint.formats.codec import FP8_FIELDS, PerExpert, check_tiles


class DeepSeekV4(PerExpert):
    """quant_method fp8 with expert_dtype fp4."""

    name: ClassVar[str] = "deepseek-v4"
    title: ClassVar[str] = "DeepSeek-V4's expert_dtype fp4"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "scale")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.int8, torch.float8_e8m0fnu)
    linear_scale: ClassVar[tuple[str, torch.dtype] | None] = ("scale", torch.float8_e8m0fnu)

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        quantization = config.get("quantization_config") or {}
        expert_dtype = quantization.get("expert_dtype", config.get("expert_dtype"))
        if quantization.get("quant_method") != "fp8" or expert_dtype != "fp4":
            return False
        check_tiles(quantization)
        return True

    def config(self, ignored: list[str]) -> dict[str, Any]:
        own = {"scale_fmt": "ue8m0", "expert_dtype": "fp4", "modules_to_not_convert": ignored}
        beside = {"expert_dtype": "fp4"} if self.names.model_type == "deepseek_v4" else {}
        return {"quantization_config": FP8_FIELDS | own, **beside}

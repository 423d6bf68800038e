"""Routed experts of a transformers model, and fake-quantization of their forward for QAT.

transformers stores routed experts as 3-D parameters and dispatches their forward through `ALL_EXPERTS_FUNCTIONS`.
Fake-quant registers another implementation there (`grouped.py`), so state-dict keys, `save_pretrained` and optimizer
references stay, and masters are quantized once per layer and step.

transformers' implementations ignore autocast, so FP32 masters would run in FP32, four times slower than bfloat16 on a
CPU. Ours casts weights like autocast (`enable_autocast`); MXFP4 values are exact in bfloat16.

Left out: experts that bypass the registry (Llama 4, LongCat, JetMoE): a ValueError names the class.
"""

from functools import partial
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from speedstack.quant.grouped import WeightForm, experts_forward
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule, fake_quantize

AUTOCAST_IMPLEMENTATION = "grouped_mm_autocast"
# Names of the router module beside the experts in transformers' MoE blocks.
_ROUTER_NAMES = ("gate", "router")


def routed_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with fused routed experts, by qualified name, in layer order. Raises ValueError if there are none, or if
    they bypass the registry.
    """
    experts = {name: module for name, module in model.named_modules() if _is_registered(module)}
    for name, module in model.named_modules():
        if _holds_unregistered_experts(module):
            raise ValueError(
                f"{type(module).__name__} ({name}) bypasses transformers' experts registry, so its weights cannot be "
                "quantized here: use a model family that dispatches through it, such as MiMo-V2, Qwen3-MoE or gpt-oss"
            )
    if not experts:
        raise ValueError(
            f"{type(model).__name__} has no fused routed experts: only Mixture-of-Experts models that keep them as 3-D "
            "parameters (transformers 5 or newer) can have them quantized"
        )
    return experts


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D weights of all routed experts by state-dict name; only these are quantized.

    Usually `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]; with `is_transposed` (gpt-oss) [E, H, 2I] and [E, I,
    H]. Raises ValueError as `routed_experts`.
    """
    return {
        f"{module_name}.{weight_name}" if module_name else weight_name: getattr(module, weight_name)
        for module_name, module in routed_experts(model).items()
        for weight_name in weight_names(module)
    }


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The routers' parameters by state-dict name, without gates of shared experts.

    Raises ValueError as `routed_experts`, and if experts have no router beside them.
    """
    parameters: dict[str, nn.Parameter] = {}
    for experts_name in routed_experts(model):
        block_name = experts_name.rpartition(".")[0]
        block = model.get_submodule(block_name)
        routers = [name for name, _ in block.named_children() if name in _ROUTER_NAMES]
        if not routers:
            raise ValueError(f"{type(block).__name__} ({block_name}) has no child named {' or '.join(_ROUTER_NAMES)}")
        for router_name in routers:
            router = block.get_submodule(router_name)
            prefix = f"{block_name}.{router_name}"
            parameters |= {f"{prefix}.{name}": parameter for name, parameter in router.named_parameters()}
    return parameters


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """Names of the two weights of one module of `routed_experts`."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def contraction_last(experts: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A view of an expert weight with the contraction axis last, as for MXFP4 blocks; its own inverse."""
    return weight.transpose(-1, -2) if experts.is_transposed else weight


def enable_fake_quant(
    model: PreTrainedModel, scale_rule: ScaleRule = DEFAULT_SCALE_RULE, dampening: float = 0.0
) -> None:
    """Makes the forward see every routed expert weight rounded to MXFP4, with straight-through gradients.

    Parameters, names and dtypes stay. With `dampening` every backward pulls masters to their MXFP4 values
    (`grouped.WeightForm`). Raises ValueError as `routed_experts`, for an unknown scale rule, a negative dampening, and
    sizes that are not multiples of 32.
    """
    if scale_rule not in get_args(ScaleRule):
        raise ValueError(f"unknown scale rule {scale_rule!r}: choose one of {', '.join(get_args(ScaleRule))}")
    if dampening < 0:
        raise ValueError(f"dampening must not be negative, got {dampening}")
    for module in routed_experts(model).values():
        for weight_name in weight_names(module):
            weight = getattr(module, weight_name).detach()
            # A weight sharded by ZeRO-3 is empty between uses; its first forward checks it.
            if weight.numel():
                # Quantizing one row checks shape and dtype completely.
                fake_quantize(contraction_last(module, weight)[0, 0], scale_rule)
    name = f"mxfp4_qat_{scale_rule}" + (f"_dampening_{dampening!r}" if dampening else "")
    _set_implementation(model, name, WeightForm(scale_rule, dampening))


def enable_autocast(model: PreTrainedModel) -> None:
    """Computes routed experts in autocast's dtype; without autocast, bit for bit as `grouped_mm`.

    Raises ValueError as `routed_experts`.
    """
    _set_implementation(model, AUTOCAST_IMPLEMENTATION, WeightForm(None))


def _is_registered(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` decorates the class: it sets these attributes."""
    weight = getattr(module, "down_proj", None)
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and isinstance(weight, nn.Parameter)


def _holds_unregistered_experts(module: nn.Module) -> bool:
    class_name = type(module).__name__
    is_experts = "Experts" in class_name and "Shared" not in class_name
    has_fused_weight = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return is_experts and has_fused_weight and not _is_registered(module)


def _set_implementation(model: PreTrainedModel, name: str, form: WeightForm) -> None:
    experts = routed_experts(model)
    ALL_EXPERTS_FUNCTIONS.register(name, partial(experts_forward, form=form))
    model.set_experts_implementation(name)
    for module_name, module in experts.items():
        if getattr(module.config, "_experts_implementation", None) != name:
            raise ValueError(f"{type(model).__name__} does not let the implementation of {module_name} be set")

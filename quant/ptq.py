"""Post-training quantization by rounding to nearest, the baseline for QAT. No calibration data.

With the default scale rule MXFP4 is within 2 % of the squared error of a per-block scale search. Modules and format are
ablation choices; the recipe is routed experts in MXFP4. Routers, norms and embeddings are never quantized.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from speedstack.quant.experts import contraction_last, routed_experts, weight_names
from speedstack.quant.formats import FormatName, fake_quantize
from speedstack.quant.mxfp4 import ScaleRule

ModuleGroup = Literal["experts", "attention", "lm_head", "all"]

# Module-name components that mark a linear layer as a router.
_ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}


@torch.no_grad()
def round_to_nearest(
    model: nn.Module,
    scale_rule: ScaleRule | None = None,
    number_format: FormatName = "mxfp4",
    modules: ModuleGroup | Sequence[ModuleGroup] = "experts",
) -> tuple[str, ...]:
    """Rounds weights in place, in their own dtype, to the nearest values of a format; returns their names.

    For MXFP4 experts this equals what `convert` stores under the same rule. `scale_rule`: see `formats.fake_quantize`;
    `modules`: see `weights_of`. Raises ValueError as those two, and for NaN or infinity, naming the weight; then
    nothing has changed.
    """
    weights = weights_of(model, modules)
    for name, weight in weights.items():
        try:
            for matrix_OK in _matrices(weight):
                # Quantizing one row checks format, rule, shape and dtype completely.
                fake_quantize(matrix_OK[:1], number_format, scale_rule)
                if not matrix_OK.isfinite().all():
                    raise ValueError(
                        f"cannot quantize NaN or infinity to {number_format}: check the weights (a diverged run, a bad "
                        "download)"
                    )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for weight in weights.values():
        for matrix_OK in _matrices(weight):
            matrix_OK.copy_(fake_quantize(matrix_OK, number_format, scale_rule))
    return tuple(weights)


def weights_of(model: nn.Module, modules: ModuleGroup | Sequence[ModuleGroup]) -> dict[str, torch.Tensor]:
    """Views of module groups' weights by state-dict name, contraction last: [out, in], or [E, out, in] of experts.

        experts     the routed experts
        attention   the linear layers inside attention modules
        lm_head     the output embedding
        all         these, and every other linear layer: dense MLPs, shared experts

    Raises ValueError for an unknown or empty group, for an `lm_head` tied to the input embedding, and for "experts" and
    "all" as `routed_experts`.
    """
    groups = (modules,) if isinstance(modules, str) else tuple(modules)
    for group in groups:
        if group not in get_args(ModuleGroup):
            raise ValueError(f"unknown modules {group!r}: choose from {', '.join(get_args(ModuleGroup))}")
    weights: dict[str, torch.Tensor] = {}
    for group in groups:
        found = {name: weight for kind in _parts(group) for name, weight in kind(model)}
        if not found:
            raise ValueError(f"{type(model).__name__} has no {group} whose weights could be quantized")
        weights |= found
    return weights


def _parts(group: ModuleGroup) -> tuple[Callable[[nn.Module], Iterator[tuple[str, torch.Tensor]]], ...]:
    parts = {
        "experts": (_experts,),
        "attention": (_attention,),
        "lm_head": (_lm_head,),
        "all": (_experts, _linears, _lm_head),
    }
    return parts[group]


def _experts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for module_name, module in routed_experts(model).items():
        for weight_name in weight_names(module):
            yield f"{module_name}.{weight_name}", contraction_last(module, getattr(module, weight_name).detach())


def _linears(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    head = _head(model)
    for name, module in model.named_modules():
        is_router = "Router" in type(module).__name__ or not _ROUTER_NAMES.isdisjoint(name.split("."))
        if isinstance(module, nn.Linear) and not is_router and module is not head:
            yield f"{name}.weight", module.weight.detach()


def _attention(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    inside = tuple(f"{name}." for name, module in model.named_modules() if "Attention" in type(module).__name__)
    return ((name, weight) for name, weight in _linears(model) if name.startswith(inside))


def _lm_head(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    head = _head(model)
    if head is None:
        return
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if embedding is not None and embedding.weight is head.weight:
        raise ValueError(
            f"the lm_head of {type(model).__name__} shares its weight with the input embedding, which is never "
            "quantized: give it a copy of its own first, or choose other modules"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    yield f"{name}.weight", head.weight.detach()


def _head(model: nn.Module) -> nn.Linear | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return head if isinstance(head, nn.Linear) else None


def _matrices(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The matrices [out, in] of a weight one by one: expert stacks are gigabytes, and a format needs several copies."""
    return iter(weight if weight.ndim == 3 else (weight,))

"""Records the inputs and routing of a model's experts in a forward."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """Inputs of one experts module: hidden states x [N, H], and the experts of each token, int64 [N, k]."""

    x_NH: torch.Tensor
    experts_Nk: torch.Tensor

    @staticmethod
    def join(calls: list["RoutedTokens"]) -> "RoutedTokens":
        """Several calls as one."""
        x_NH = torch.cat([call.x_NH for call in calls])
        return RoutedTokens(x_NH, torch.cat([call.experts_Nk for call in calls]))


@contextmanager
def record_routing(experts: Mapping[int, nn.Module]) -> Iterator[dict[int, list[RoutedTokens]]]:
    """Records every call of these experts modules under its key inside the block, for any implementation.

    Arguments are identified by the registry's parameter names.
    """
    signature = inspect.signature(grouped_mm_experts_forward)
    calls: dict[int, list[RoutedTokens]] = {key: [] for key in experts}

    def note(key: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(module, *args, **kwargs).arguments
        calls[key].append(RoutedTokens(arguments["hidden_states"], arguments["top_k_index"]))

    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, key=key: note(key, module, args, kwargs), with_kwargs=True
        )
        for key, module in experts.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()

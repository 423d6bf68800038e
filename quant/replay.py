"""Runs a transformers model's decoder layers one at a time, or from one on, with recorded earlier outputs.

Layerwise quantization and per-layer ablations need this. The model runs its own forward, with its masks and position
embeddings, while layers outside the range return a recorded output; this works if layers pass on only their output.

Left out: models of several stacks, and layers that share more than hidden states (such as keys and values), whose
replay would differ.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.quant.experts import routed_experts


class DecoderLayers:
    """A model's decoder layers and their routed experts. Weights may change between calls.

    experts: layer index -> experts module; names: layer index -> its qualified name. Raises ValueError as
    `routed_experts`, and for experts outside one list of layers or twice in a layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.experts: dict[int, nn.Module] = {}
        self.names: dict[int, str] = {}
        stacks: set[str] = set()
        for name, module in routed_experts(model).items():
            stack, index = _place_in_list(model, name)
            stacks.add(stack)
            if len(stacks) > 1 or index in self.experts:
                raise ValueError(
                    f"{type(model).__name__} has routed experts in several stacks of layers, or several in a layer "
                    f"({name}): running it layer by layer needs one stack and at most one experts module a layer"
                )
            self.experts[index], self.names[index] = module, name
        self._layers = cast(nn.ModuleList, model.get_submodule(stacks.pop()))

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def run_all(self, ids_BT: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
        """Every layer's output in order, and the logits [B, T, V], from one forward."""
        outputs: list[Any] = []
        hooks = [layer.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for layer in self._layers]
        try:
            logits_BTV = self._model(input_ids=ids_BT, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return outputs, logits_BTV

    @torch.no_grad()
    def run_one(self, index: int, ids_BT: torch.Tensor, previous: Any) -> Any:
        """The output of layer `index`, from the previous layer's output (None for layer 0)."""
        made: list[Any] = []
        hook = self._layers[index].register_forward_hook(lambda _m, _i, output: made.append(output))
        try:
            # Later layers pass its output to the final norm, whose result is discarded.
            with (
                _handing_on(self._layers[:index], lambda: previous),
                _handing_on(self._layers[index + 1 :], lambda: made[0]),
            ):
                self._model.base_model(input_ids=ids_BT, use_cache=False)
        finally:
            hook.remove()
        return made[0]

    @torch.no_grad()
    def logits_from(self, index: int, ids_BT: torch.Tensor, previous: Any) -> torch.Tensor:
        """Logits [B, T, V] of a forward from layer `index` on, given the previous layer's output."""
        with _handing_on(self._layers[:index], lambda: previous):
            return self._model(input_ids=ids_BT, use_cache=False).logits


@contextmanager
def _handing_on(layers: Iterable[nn.Module], output: Callable[[], Any]) -> Iterator[None]:
    """Makes these layers return `output()` without computing, inside the block."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer, _ in before:
            vars(layer)["forward"] = lambda *_args, **_kwargs: output()
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                vars(layer).pop("forward", None)
            else:  # somebody else's forward, such as accelerate's
                vars(layer)["forward"] = forward


def _place_in_list(model: nn.Module, name: str) -> tuple[str, int]:
    """The outermost module list around `name`, and the module's index in it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        list_name = ".".join(parts[:depth])
        if isinstance(model.get_submodule(list_name), nn.ModuleList):
            return list_name, int(parts[depth])
    raise ValueError(f"{name} is in no list of layers: layer by layer quantization needs one")

"""Runs the decoder layers of a transformers model one at a time, or from one of them on, with outputs kept from before.

Layer by layer quantization and per-layer ablations both need "the rest of the model, from here". Calling layers by hand
needs each family's masks and position embeddings; instead the model runs its own forward, while layers outside the
range hand on an output recorded earlier. So it works for every family whose layers pass nothing on but their output.

Left out: models of several stacks, and families whose layers share more than hidden states (keys and values of an
earlier layer, say), for which a replayed forward would differ.

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
    """The decoder layers of `model`, and which of them hold routed experts. Weights may change between calls.

    experts: layer index -> its experts module; names: layer index -> that module's qualified name.

    Raises ValueError as `routed_experts` does, and for experts outside one list of layers, or twice in a layer.
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
        """The output of every layer, in order, and the logits [B, T, V], of one forward."""
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
        """The output of layer `index`, given that of the layer before it (None for layer 0)."""
        made: list[Any] = []
        hook = self._layers[index].register_forward_hook(lambda _m, _i, output: made.append(output))
        try:
            # The layers after it hand its output on to the model's last norm, whose result is thrown away.
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
        """Logits [B, T, V] of a forward that starts with layer `index`, given the output of the layer before it."""
        with _handing_on(self._layers[:index], lambda: previous):
            return self._model(input_ids=ids_BT, use_cache=False).logits


@contextmanager
def _handing_on(layers: Iterable[nn.Module], output: Callable[[], Any]) -> Iterator[None]:
    """While it lasts these layers compute nothing and return `output()`."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer, _ in before:
            vars(layer)["forward"] = lambda *_args, **_kwargs: output()
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                vars(layer).pop("forward", None)
            else:  # somebody else's, such as accelerate's
                vars(layer)["forward"] = forward


def _place_in_list(model: nn.Module, name: str) -> tuple[str, int]:
    """The outermost list of modules around the module `name`, and the module's index in it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        list_name = ".".join(parts[:depth])
        if isinstance(model.get_submodule(list_name), nn.ModuleList):
            return list_name, int(parts[depth])
    raise ValueError(f"{name} is in no list of layers: layer by layer quantization needs one")

"""Replayed forwards are the forward, to the bit, in every family; and nothing of the replay stays behind."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.quant.experts import routed_experts
from speedstack.quant.replay import DecoderLayers
from speedstack.quant.routing import RoutedTokens, record_routing

FAMILIES = ["mimo_v2_flash", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"]
IDS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, make_family: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return make_family(request.param)


def test_layer_by_layer_is_the_forward(model: PreTrainedModel) -> None:
    layers = DecoderLayers(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    outputs, logits = layers.run_all(IDS)
    assert torch.equal(logits, expected) and len(outputs) == len(layers) == model.config.num_hidden_layers
    previous = None
    for index in range(len(layers)):
        assert torch.equal(layers.logits_from(index, IDS, previous), expected)
        previous = layers.run_one(index, IDS, previous)
        assert torch.equal(previous, outputs[index])
    assert all("forward" not in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_only_the_layers_asked_for_are_computed(make_family: Callable[[str], PreTrainedModel]) -> None:
    model = make_family("mimo_v2_flash")
    layers = DecoderLayers(model)
    outputs, _ = layers.run_all(IDS)
    computed: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
    layers.run_one(1, IDS, outputs[0])
    assert computed == [1]
    computed.clear()
    layers.logits_from(1, IDS, outputs[0])
    assert computed == [1, 2]


def test_experts_by_layer(make_family: Callable[[str], PreTrainedModel]) -> None:
    model = make_family("mimo_v2_flash")
    layers = DecoderLayers(model)
    assert layers.names == {1: "model.layers.1.mlp.experts", 2: "model.layers.2.mlp.experts"}
    assert {layers.names[index]: module for index, module in layers.experts.items()} == routed_experts(model)


def test_a_forward_of_somebody_else_is_put_back(make_family: Callable[[str], PreTrainedModel]) -> None:
    """accelerate replaces `forward` on the instance as well, and expects to find it there."""
    model = make_family("mimo_v2_flash")
    layer = model.model.layers[0]
    original = layer.forward
    vars(layer)["forward"] = wrapped = lambda *args, **kwargs: original(*args, **kwargs)
    layers = DecoderLayers(model)
    outputs, logits = layers.run_all(IDS)
    assert torch.equal(layers.logits_from(1, IDS, outputs[0]), logits)
    assert vars(layer)["forward"] is wrapped


def test_an_error_leaves_the_model_as_it_was(make_family: Callable[[str], PreTrainedModel]) -> None:
    model = make_family("mimo_v2_flash")
    layers = DecoderLayers(model)
    with pytest.raises(AttributeError):
        layers.logits_from(2, IDS, object())
    assert all("forward" not in vars(module) for module in model.modules())


def test_two_stacks_are_refused(make_family: Callable[[str], PreTrainedModel]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = make_family("mimo_v2_flash"), make_family("mimo_v2_flash")

    with pytest.raises(ValueError, match="in several stacks of layers"):
        DecoderLayers(Pair())  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_routing_is_recorded_whatever_computes_it(
    implementation: str, make_family: Callable[[str], PreTrainedModel]
) -> None:
    model = make_family("gpt_oss")
    model.set_experts_implementation(implementation)
    layers = DecoderLayers(model)
    with torch.no_grad(), record_routing(layers.experts) as calls:
        model(input_ids=IDS)
        model(input_ids=IDS)
    for index, module in layers.experts.items():
        assert len(calls[index]) == 2
        tokens = RoutedTokens.join(calls[index])
        assert tokens.x_NH.shape == (64, 64) and tokens.experts_Nk.shape == (64, 2)
        assert tokens.experts_Nk.min() >= 0 and tokens.experts_Nk.max() < 4
        assert not module._forward_pre_hooks

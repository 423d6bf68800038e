"""Every model family that is named, as a tiny random instance of its own class, through training and back from disk."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import load_model
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.experts import enable_fake_quant, expert_parameters, routed_experts, router_parameters
from speedstack.quant.ptq import round_to_nearest
from tests.packing import save_packed

FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "mimo_v2_flash",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
]
# Families with experts that every token goes through; they are small, and stay in full precision.
SHARED_EXPERTS = {"deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2_moe"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 27).view(2, 12), use_cache=False).logits


def outputs_of_first_block(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What each child of the first Mixture-of-Experts block computes: its input is the same, quantized or not."""
    block_name = next(iter(routed_experts(model))).rpartition(".")[0]
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            assert isinstance(first, torch.Tensor)
            outputs[name] = first

        return hook

    hooks = [
        child.register_forward_hook(record(name)) for name, child in model.get_submodule(block_name).named_children()
    ]
    with torch.no_grad():
        logits(model)
    for hook in hooks:
        hook.remove()
    return outputs


def save(model: PreTrainedModel, path: Path) -> None:
    """Packed where the family's format is known, else the rounded weights as `save_pretrained` writes them."""
    try:
        hub_names(model.config.model_type)
    except ValueError:
        rounded = copy.deepcopy(model)
        round_to_nearest(rounded)
        rounded.save_pretrained(path)
    else:
        save_packed(model, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_fake_quant_changes_routed_experts_alone(
    family: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = make_family(family)
    keys = list(model.state_dict())
    before = outputs_of_first_block(model)
    enable_fake_quant(model)
    assert list(model.state_dict()) == keys

    after = outputs_of_first_block(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"experts"}
    assert any("shared" in name for name in before) == (family in SHARED_EXPERTS)
    assert {"gate", "router"} & before.keys()

    experts, routers = expert_parameters(model), router_parameters(model)
    assert not experts.keys() & routers.keys()
    logits(model).square().mean().backward()
    for name, parameter in experts.items():
        assert parameter.ndim == 3 and parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for name, parameter in routers.items():
        assert parameter.shape[0] == 4 or family == "mimo_v2_flash", name
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    save(model, tmp_path / family)
    loaded = load_model(tmp_path / family)
    with torch.no_grad():
        # Our forward and transformers' own compute the same bits from the same weights.
        assert torch.equal(logits(loaded), logits(model))

"""Which weights each group of modules has, and that rounding touches these and nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from speedstack.quant.experts import expert_parameters
from speedstack.quant.formats import FormatName, fake_quantize
from speedstack.quant.ptq import ModuleGroup, round_to_nearest, weights_of

Make = Callable[[str], PreTrainedModel]

FAMILIES = ["mimo_v2_flash", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "mixtral", "glm4_moe"]
NEVER = ("norm", "router", "mlp.gate.", "shared_expert_gate", "embed_tokens", "sinks", "bias", "rotary")


def untied(make_family: Make, family: str) -> PreTrainedModel:
    """A copy whose head is its own, as most large models have it."""
    model = copy.deepcopy(make_family(family))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("modules", ["experts", "attention", "lm_head", "all"])
def test_only_the_named_weights_change(make_family: Make, family: str, modules: ModuleGroup) -> None:
    model = untied(make_family, family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = round_to_nearest(model, number_format="mxfp8_e4m3", modules=modules)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(named) and named
    assert not [name for name in changed if any(word in name for word in NEVER)]
    if modules == "experts":
        assert changed == set(expert_parameters(model))
    elif modules == "attention":
        assert all(".self_attn." in name for name in changed)
        assert {name.split(".")[-2] for name in changed} >= {"o_proj"}
    elif modules == "lm_head":
        assert changed == {"lm_head.weight"}
    else:
        # Everything that is a matrix and not on the list.
        expected = {
            name for name, tensor in before.items() if tensor.ndim > 1 and not any(word in name for word in NEVER)
        }
        assert changed == expected


def test_groups_add_up(make_family: Make) -> None:
    model = untied(make_family, "qwen3_moe")
    both = weights_of(model, ("experts", "attention"))
    assert set(both) == set(weights_of(model, "experts")) | set(weights_of(model, "attention"))
    assert len(both) == 2 * 1 + 2 * 4  # one layer of two has experts; q, k, v and o in both


@pytest.mark.parametrize("number_format", ["mxfp4", "nvfp4", "int4_g32", "fp8_block128", "mxfp6_e2m3"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_values_are_those_of_the_format(make_family: Make, family: str, number_format: FormatName) -> None:
    """Matrix by matrix with the contraction last, which gpt-oss stores first."""
    model = untied(make_family, family)
    before = {name: weight.clone() for name, weight in weights_of(model, "all").items()}
    round_to_nearest(model, number_format=number_format, modules="all")
    for name, weight in weights_of(model, "all").items():
        assert torch.equal(weight, fake_quantize(before[name], number_format)), name


def test_scale_rules_reach_the_format(make_family: Make) -> None:
    rounded = {}
    for rule in ("floor", "rceil", "even"):
        model = untied(make_family, "qwen3_moe")
        round_to_nearest(model, rule, "mxfp6_e2m3", "attention")  # type: ignore[arg-type]
        rounded[rule] = torch.cat([weight.flatten() for weight in weights_of(model, "attention").values()])
    assert not torch.equal(rounded["floor"], rounded["rceil"]) and not torch.equal(rounded["even"], rounded["rceil"])


def test_nothing_changes_when_it_raises(make_family: Make) -> None:
    model = untied(make_family, "qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj: cannot quantize NaN"):
        round_to_nearest(model, modules="all")
    with pytest.raises(ValueError, match=r"has no scale rule"):
        round_to_nearest(model, "even", "nvfp4", "attention")
    with pytest.raises(ValueError, match="unknown number format 'fp3'"):
        round_to_nearest(model, number_format="fp3", modules="attention")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown modules 'mlp': choose from experts, attention, lm_head, all"):
        round_to_nearest(model, modules=("attention", "mlp"))  # type: ignore[arg-type]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_a_tied_head_is_refused(make_family: Make) -> None:
    model = make_family("qwen3_moe")  # its config ties them
    for modules in ("lm_head", "all"):
        with pytest.raises(ValueError, match="shares its weight with the input embedding"):
            weights_of(model, modules)  # type: ignore[arg-type]
    assert weights_of(model, "attention")


def test_models_without_the_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    for modules in ("attention", "lm_head"):
        with pytest.raises(ValueError, match=f"Sequential has no {modules} whose weights"):
            weights_of(model, modules)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no fused routed experts"):
        weights_of(model, "experts")

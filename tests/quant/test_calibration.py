"""GPTQ of whole models: second moments from routed tokens, in every layout, and what it reports."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.quant import calibration
from speedstack.quant.calibration import gptq_experts
from speedstack.quant.checkpoint import load_checkpoint
from speedstack.quant.experts import contraction_last, expert_parameters, routed_experts, weight_names
from speedstack.quant.gptq import gptq
from speedstack.quant.mxfp4 import MXFP4Tensor, ScaleRule, quantize
from speedstack.quant.ptq import round_to_nearest
from tests.packing import save_packed

MakeFamily = Callable[[str], PreTrainedModel]
FAMILIES = ["mimo_v2_flash", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"]
BATCHES = list(torch.randint(3, 64, (6, 48), generator=torch.Generator().manual_seed(0)).split(2))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, make_family: MakeFamily) -> PreTrainedModel:
    return make_family(request.param)


def slow_gptq_experts(model: PreTrainedModel, scale_rule: ScaleRule) -> None:
    """The same with nothing replayed and nothing grouped: a whole forward of all batches for every matrix of every
    expert, with hooks in the family's own eager loop where the expert's inputs are multiplied.
    """
    model.set_experts_implementation("eager")
    for module in routed_experts(model).values():
        for name in weight_names(module):
            weight_EOK = contraction_last(module, getattr(module, name).data)
            inputs: list[list[torch.Tensor]] = [[] for _ in weight_EOK]
            everything: list[torch.Tensor] = []
            hook = module.register_forward_pre_hook(lambda _, args, everything=everything: everything.append(args[0]))
            with torch.no_grad(), _Multiplications(getattr(module, name), inputs):
                for ids_BT in BATCHES:
                    model(input_ids=ids_BT)
            hook.remove()
            x_NH = torch.cat(everything)
            for expert, parts in enumerate(inputs):
                x_SK = torch.cat([torch.empty(0, weight_EOK.shape[-1]), *parts])
                num_borrowed = min(max(0, weight_EOK.shape[-1] - len(x_SK)), len(x_NH))
                if num_borrowed:
                    extra = x_NH[[i * len(x_NH) // num_borrowed for i in range(num_borrowed)]]
                    if name == "down_proj":
                        up = weight_names(module)[0]
                        w_OK = contraction_last(module, getattr(module, up).data)[expert]
                        bias = getattr(module, f"{up}_bias")[expert] if module.has_bias else 0.0
                        extra = getattr(module, "_apply_gate")(extra @ w_OK.T + bias).detach()  # noqa: B009
                    x_SK = torch.cat([x_SK, extra])
                x_SK = x_SK.double()
                result = gptq(weight_EOK[expert : expert + 1], (x_SK.T @ x_SK / len(x_SK))[None], scale_rule)
                weight_EOK[expert] = result.values[0]


class _Multiplications(torch.overrides.TorchFunctionMode):
    """Collects what each expert's part of `weight` is multiplied with, told by where in memory the part lies."""

    def __init__(self, weight: torch.Tensor, inputs: list[list[torch.Tensor]]) -> None:
        super().__init__()
        self._expert_at = {part.data_ptr(): expert for expert, part in enumerate(weight)}
        self._inputs = inputs

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (nn.functional.linear, torch.Tensor.__matmul__, torch.Tensor.matmul) and args[1].ndim == 2:
            expert = self._expert_at.get(args[1].data_ptr())
            if expert is not None:
                self._inputs[expert].append(args[0].detach())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["mimo_v2_flash", "gpt_oss", "qwen3_moe"])
def test_equals_whole_forwards(model_type: str, make_family: MakeFamily) -> None:
    """gate_up_proj of the first sparse layer to the bit; later ones see inputs that grouped_mm and the eager loop round
    differently, by which an element near the middle between two values may fall: at most 1 % of them.
    """
    ours, slow = make_family(model_type), make_family(model_type)
    gptq_experts(ours, BATCHES, "even")
    slow_gptq_experts(slow, "even")
    original = expert_parameters(make_family(model_type))
    for name, parameter in expert_parameters(ours).items():
        expected = expert_parameters(slow)[name]
        assert (parameter != expected).float().mean() < 0.01, name
        assert not torch.equal(parameter, original[name])


def test_only_routed_experts_change_and_to_mxfp4(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._experts_implementation
    gptq_experts(model, BATCHES)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(expert_parameters(model))
    assert model.config._experts_implementation == implementation
    for module in routed_experts(model).values():
        for name in weight_names(module):
            weight_EOK = contraction_last(module, getattr(module, name).detach())
            assert torch.equal(quantize(weight_EOK).dequantize(), weight_EOK)


def test_output_is_nearer_than_that_of_rounding(make_family: MakeFamily) -> None:
    """On other tokens than those of the calibration, of the same kind."""
    for model_type in ("mimo_v2_flash", "gpt_oss"):
        model = make_family(model_type)
        rounded, calibrated = copy.deepcopy(model), copy.deepcopy(model)
        round_to_nearest(rounded, "mse")
        generator = torch.Generator().manual_seed(1)
        gptq_experts(calibrated, list(torch.randint(3, 64, (32, 48), generator=generator).split(8)))
        ids_BT = torch.randint(3, 64, (8, 48), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=ids_BT).logits
            errors = [(other(input_ids=ids_BT).logits - logits).square().mean() for other in (rounded, calibrated)]
        assert errors[1] < errors[0], model_type


@pytest.mark.parametrize("scale_rule", ["floor", "rceil", "even", "mse"])
def test_packed_model_holds_these_values(scale_rule: ScaleRule, make_family: MakeFamily, tmp_path: Path) -> None:
    """`save_packed` quantizes again, under whatever rule, and changes nothing."""
    model = make_family("mimo_v2_flash")
    gptq_experts(model, BATCHES)
    save_packed(model, tmp_path, scale_rule=scale_rule)
    tensors = load_checkpoint(tmp_path).tensors
    for name, parameter in expert_parameters(model).items():
        stored = tensors[name]
        assert isinstance(stored, MXFP4Tensor)
        assert torch.equal(stored.dequantize(), parameter)
        assert torch.equal(stored.codes, quantize(parameter, "floor").codes)


def test_report(model: PreTrainedModel) -> None:
    with torch.no_grad():
        tokens = {
            name: [0] * module.get_parameter("down_proj").shape[0] for name, module in routed_experts(model).items()
        }
        name_of = {id(module): name for name, module in routed_experts(model).items()}

        def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for expert in args[1].flatten().tolist():
                tokens[name_of[id(module)]][expert] += 1

        hooks = [module.register_forward_pre_hook(count) for module in routed_experts(model).values()]
        first = next(iter(tokens))
        for ids_BT in BATCHES:
            model(input_ids=ids_BT)
        for hook in hooks:
            hook.remove()
    report = gptq_experts(model, BATCHES)
    assert report.num_tokens == 6 * 48
    shapes = {name: parameter.shape for name, parameter in expert_parameters(model).items()}
    assert [(entry.weight, entry.expert) for entry in report.experts] == [
        (name, expert) for name, shape in shapes.items() for expert in range(shape[0])
    ]
    for entry in report.experts:
        assert 0 <= entry.error <= entry.rtn_error < 1
        assert entry.layer == int(entry.weight.split(".")[2])
        if entry.weight.startswith(f"{first}."):
            assert entry.num_tokens == tokens[first][entry.expert]
        module = model.get_submodule(entry.weight.rpartition(".")[0])
        num_inputs = contraction_last(module, getattr(module, entry.weight.rpartition(".")[2])).shape[-1]
        assert entry.num_borrowed == max(0, num_inputs - entry.num_tokens)
        assert entry.damping == 0.01 or entry.is_fallback
    assert report.num_borrowers == sum(entry.num_borrowed > 0 for entry in report.experts)
    assert report.error_ratio < 1


def test_an_expert_nobody_chose_is_calibrated_on_its_layer(make_family: MakeFamily) -> None:
    model = make_family("mimo_v2_flash")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100.0
    report = gptq_experts(model, BATCHES)
    lonely = [entry for entry in report.experts if (entry.layer, entry.expert) == (1, 3)]
    assert [entry.num_tokens for entry in lonely] == [0, 0]
    assert [entry.num_borrowed for entry in lonely] == [64, 32]
    assert all(entry.error < entry.rtn_error for entry in lonely)


def test_groups_of_experts_change_nothing(make_family: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = make_family("gpt_oss"), make_family("gpt_oss")
    first = gptq_experts(together, BATCHES)
    monkeypatch.setattr(calibration, "GROUP_BYTES", 1)
    second = gptq_experts(apart, BATCHES)
    assert [entry.weight for entry in first.experts] == [entry.weight for entry in second.experts]
    for name, parameter in expert_parameters(together).items():
        assert torch.equal(parameter, expert_parameters(apart)[name])


def test_bfloat16(make_family: MakeFamily) -> None:
    model = make_family("mimo_v2_flash").bfloat16()
    report = gptq_experts(model, BATCHES)
    assert report.error_ratio < 1
    for parameter in expert_parameters(model).values():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(quantize(parameter).dequantize(torch.bfloat16), parameter)


def test_progress_and_refusals(make_family: MakeFamily) -> None:
    model = make_family("mimo_v2_flash")
    seen: list[tuple[int, int]] = []
    gptq_experts(model, BATCHES[:1], on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="needs calibration text"):
        gptq_experts(model, [])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expert_parameters(model)["model.layers.2.mlp.experts.down_proj"][3, 1, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts\.down_proj: cannot quantize NaN"):
        gptq_experts(model, BATCHES)
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert len(unchanged) == len(before) - 1  # the one with NaN

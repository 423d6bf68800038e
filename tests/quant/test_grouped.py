"""The packed backward against the plain one, which keeps dense weights: same bits, a fraction of the memory."""

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from speedstack.eval.microbench.qat import plain_experts_forward
from speedstack.quant import grouped
from speedstack.quant.experts import contraction_last, enable_fake_quant, routed_experts, weight_names
from speedstack.quant.grouped import WeightForm, experts_forward
from speedstack.quant.mxfp4 import dequantize, quantize

# Concatenated gate and up; interleaved, transposed and with biases.
LAYOUTS = ["qwen3_moe", "gpt_oss"]
NUM_TOKENS, NUM_CHOICES, HIDDEN_SIZE = 24, 3, 64


@pytest.fixture(params=LAYOUTS)
def experts(request: pytest.FixtureRequest, make_family: Callable[[str], PreTrainedModel]) -> nn.Module:
    return next(iter(routed_experts(make_family(request.param)).values()))


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, choices among 4 experts of which the last gets no token, weights."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator)
    choices = torch.rand(NUM_TOKENS, 3, generator=generator).argsort(dim=-1)[:, :NUM_CHOICES]
    return hidden_states, choices, torch.rand(NUM_TOKENS, NUM_CHOICES, generator=generator)


def run(
    module: nn.Module,
    forward: Callable[..., torch.Tensor],
    form: WeightForm,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[..., torch.Tensor] = lambda function, *inputs: function(*inputs),
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Output, and gradients of inputs and parameters, of a fresh copy of `module`."""
    module = copy.deepcopy(module)
    hidden_states, choices, weights = make_inputs()
    hidden_states.requires_grad_(True)
    weights.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = wrap(lambda *inputs: forward(module, *inputs, form=form), hidden_states, choices, weights)
    (out.float() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return out.detach(), {"hidden_states": hidden_states.grad, "top_k_weights": weights.grad, **gradients}


def assert_same_bits(
    one: tuple[torch.Tensor, dict[str, torch.Tensor | None]], two: tuple[torch.Tensor, dict[str, torch.Tensor | None]]
) -> None:
    assert torch.equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        other = two[1][name]
        assert gradient is not None and other is not None, name
        assert gradient.dtype == other.dtype and torch.equal(gradient, other), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [WeightForm("even"), WeightForm("mse"), WeightForm(None)], ids=str)
def test_output_and_gradients_are_those_of_the_plain_way(
    experts: nn.Module, form: WeightForm, dtype: torch.dtype
) -> None:
    assert_same_bits(run(experts, experts_forward, form, dtype), run(experts, plain_experts_forward, form, dtype))


@pytest.mark.parametrize("num_choices", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_pairs_are_added_up_as_indexing_adds_them(dtype: torch.dtype, num_choices: int) -> None:
    """Bit for bit, on several threads too: first row first in the gradient, `torch.sum` in the forward."""
    generator = torch.Generator().manual_seed(0)
    # 100 columns: torch.sum makes partial sums of the last four of them.
    x_TH, x_SH = (torch.randn(n, 100, generator=generator).to(dtype) for n in (50, 50 * num_choices))
    _, order_S = torch.sort(torch.randint(6, (50 * num_choices,), generator=generator))
    places_TJ = order_S.argsort().view(50, num_choices)

    rows_SH = grouped._Gather.apply(x_TH.requires_grad_(True), order_S, num_choices)
    assert torch.equal(rows_SH, x_TH[order_S // num_choices])
    rows_SH.backward(x_SH)
    by_place_TJ = places_TJ.sort(dim=-1).values
    expected_TH = x_SH[by_place_TJ[:, 0]]
    for choice in range(1, num_choices):
        expected_TH = expected_TH + x_SH[by_place_TJ[:, choice]]
    assert x_TH.grad is not None and torch.equal(x_TH.grad, expected_TH)

    sums_TH = grouped._Sum.apply(x_SH.requires_grad_(True), order_S, num_choices)
    assert torch.equal(sums_TH, x_SH[places_TJ].sum(dim=1))
    sums_TH.backward(x_TH.detach())
    assert x_SH.grad is not None and torch.equal(x_SH.grad, x_TH[order_S // num_choices])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing(experts: nn.Module, dtype: torch.dtype, use_reentrant: bool) -> None:
    def wrap(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(function, *inputs, use_reentrant=use_reentrant)

    form = WeightForm("even")
    assert_same_bits(run(experts, experts_forward, form, dtype, wrap), run(experts, plain_experts_forward, form, dtype))


def saved_tensors(module: nn.Module, forward: Callable[..., torch.Tensor], form: WeightForm) -> list[torch.Tensor]:
    """What autograd keeps for the backward under autocast, parameters left out, one tensor a storage."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden_states, choices, weights = make_inputs()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        forward(module, hidden_states.requires_grad_(True), choices, weights, form=form)
    return list(saved.values())


def test_backward_keeps_codes_and_no_dense_weight(experts: nn.Module) -> None:
    masters = [getattr(experts, name) for name in weight_names(experts)]
    sizes = {master.numel() for master in masters}
    packed_bytes = sum(quantize(contraction_last(experts, master.detach())).nbytes for master in masters)

    def dense(saved: list[torch.Tensor]) -> set[int]:
        return {tensor.numel() for tensor in saved if tensor.is_floating_point() and tensor.numel() in sizes}

    saved = saved_tensors(experts, experts_forward, WeightForm("even"))
    assert not dense(saved)
    assert sum(tensor.nbytes for tensor in saved if tensor.dtype == torch.uint8) == packed_bytes
    # Without fake-quant the master itself is kept, and no copy of it in bfloat16.
    assert not dense(saved_tensors(experts, experts_forward, WeightForm(None)))
    # The same probe sees the dense weights where they are kept.
    assert dense(saved_tensors(experts, plain_experts_forward, WeightForm("even"))) == sizes


def test_nothing_is_packed_without_gradients(experts: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    form, inputs = WeightForm("even"), make_inputs()
    expected = run(experts, experts_forward, form)[0]
    monkeypatch.setattr(grouped, "quantize", None)
    with torch.no_grad():
        assert torch.equal(experts_forward(experts, *inputs, form=form), expected)
    with pytest.raises(TypeError, match="not callable"):
        experts_forward(experts, inputs[0].requires_grad_(True), *inputs[1:], form=form)


@pytest.mark.parametrize("trained", ["masters", "inputs"])
def test_frozen_masters_and_frozen_inputs(experts: nn.Module, trained: str) -> None:
    """Gradients go only where they are wanted, and are the same there."""
    form = WeightForm("even")
    _, expected = run(experts, experts_forward, form)
    hidden_states, choices, weights = make_inputs()
    names = weight_names(experts)
    for parameter in experts.parameters():
        parameter.requires_grad_(trained == "masters")
    hidden_states.requires_grad_(trained == "inputs")
    out = experts_forward(experts, hidden_states, choices, weights, form=form)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    gradients = {"hidden_states": hidden_states.grad} | {name: getattr(experts, name).grad for name in names}
    for name, gradient in gradients.items():
        wanted = (name == "hidden_states") == (trained == "inputs")
        assert (gradient is not None) == wanted, name
        assert gradient is None or torch.equal(gradient, cast(torch.Tensor, expected[name])), name


def test_large_weights_in_parts(experts: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    form = WeightForm("even", dampening=0.5)
    expected = run(experts, experts_forward, form)
    num_elements = max(getattr(experts, name)[0].numel() for name in weight_names(experts))
    for max_part_elements in (1, 3 * num_elements):
        monkeypatch.setattr(grouped, "_MAX_PART_ELEMENTS", max_part_elements)
        assert_same_bits(run(experts, experts_forward, form), expected)


def test_dampening_pulls_masters_to_their_values(experts: nn.Module) -> None:
    _, without = run(experts, experts_forward, WeightForm("even"))
    _, pulled = run(experts, experts_forward, WeightForm("even", dampening=0.25))
    for name in weight_names(experts):
        master = contraction_last(experts, getattr(experts, name).detach())
        pull = contraction_last(experts, 0.25 * (master - dequantize(quantize(master))))
        assert pull.abs().max() > 0
        assert torch.equal(cast(torch.Tensor, pulled[name]), cast(torch.Tensor, without[name]) + pull)
    assert torch.equal(cast(torch.Tensor, pulled["hidden_states"]), cast(torch.Tensor, without["hidden_states"]))


def test_dampening_is_checked_and_part_of_the_name(make_family: Callable[[str], PreTrainedModel]) -> None:
    model = make_family("qwen3_moe")
    with pytest.raises(ValueError, match="dampening must not be negative"):
        enable_fake_quant(model, dampening=-1.0)
    enable_fake_quant(model, dampening=0.5)
    assert model.config._experts_implementation == "mxfp4_qat_even_dampening_0.5"


def test_expert_parallel_modules_are_refused(experts: nn.Module) -> None:
    experts._is_expert_parallel = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="split by expert parallelism"):
        experts_forward(experts, *make_inputs(), form=WeightForm("even"))

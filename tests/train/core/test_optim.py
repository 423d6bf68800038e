import pytest
import torch
from torch import nn

from speedstack.train.config.recipes import OptimSection
from speedstack.train.core import optim
from speedstack.train.core.optim import (
    Muon,
    build_optimizer,
    is_muon_parameter,
    learning_rate_factor,
    orthogonalize,
    set_learning_rate,
)


class Layers(nn.Module):
    """One parameter of every kind the optimizer tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.wide = nn.Linear(12, 8, bias=False)
        self.tall = nn.Linear(8, 12)
        self.experts = nn.Parameter(torch.zeros(3, 8, 12))
        self.gate = nn.Linear(8, 3, bias=False)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.norm = nn.Parameter(torch.ones(8))


def layers_with_gradients() -> Layers:
    torch.manual_seed(0)
    layers = Layers()
    for parameter in layers.parameters():
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)
    return layers


@pytest.mark.parametrize("is_bfloat16", [False, True])
@pytest.mark.parametrize("shape", [(400, 8, 8), (50, 12, 30), (2, 64, 64), (3, 256, 300)])
def test_orthogonalize_makes_singular_values_about_one(
    shape: tuple[int, ...], is_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "is_bfloat16_faster", lambda device: is_bfloat16)
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    # [0.7, 1.3] and the rounding of bfloat16; the very small ones of a square random matrix have not come all the way,
    # so the lower bound is on most of them.
    assert values.max() < 1.35
    assert (values > 0.65).float().mean() > 0.9
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(), (u @ vh).flatten(), dim=0)
    assert cosine > 0.95


@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_matrices_of_few_directions_do_not_blow_up(is_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "is_bfloat16_faster", lambda device: is_bfloat16)
    torch.manual_seed(0)
    for rank in (1, 2):
        matrices = torch.randn(50, 32, rank) @ torch.randn(50, rank, 64) + 1e-4 * torch.randn(50, 32, 64)
        assert torch.linalg.svdvals(orthogonalize(matrices)).max() < 1.35
    assert not orthogonalize(torch.zeros(1, 8, 8)).any()


def test_what_caches_hold_at_once_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "is_bfloat16_faster", lambda device: False)
    matrices = torch.randn(7, 16, 24, generator=torch.Generator().manual_seed(0))
    whole = orthogonalize(matrices)
    monkeypatch.setattr(optim, "_MAX_CACHED_ELEMENTS", 2 * 16 * 24)
    torch.testing.assert_close(orthogonalize(matrices), whole)


def test_muon_is_the_update_of_torch_on_each_matrix_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has Jordan's polynomial, and the same in every step.
    monkeypatch.setattr(optim, "_QUINTICS", ((3.4445, -4.7750, 2.0315),) * 5)
    ours, section = layers_with_gradients(), OptimSection(lr=0.1, weight_decay=0.01, momentum=0.9)
    optimizer = build_optimizer(ours, section)
    reference = layers_with_gradients()
    matrices = [nn.Parameter(matrix.clone()) for matrix in reference.experts.data]
    singles = [reference.wide.weight, reference.tall.weight, *matrices]
    theirs = torch.optim.Muon(singles, lr=0.1, weight_decay=0.01, momentum=0.9, adjust_lr_fn="original")
    for step in range(3):
        torch.manual_seed(step)
        for parameter, twin in zip(ours.parameters(), reference.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        for index, matrix in enumerate(matrices):
            assert reference.experts.grad is not None
            matrix.grad = reference.experts.grad[index].clone()
        optimizer.step()
        theirs.step()
    # Both run Newton-Schulz in bfloat16, ours batched and with tall matrices transposed. Its five steps amplify the
    # rounding of 2^-8 to a few per cent of an update, which has entries of about lr / sqrt(8) = 0.035.
    torch.testing.assert_close(ours.wide.weight, singles[0], rtol=0, atol=6e-3)
    torch.testing.assert_close(ours.tall.weight, singles[1], rtol=0, atol=6e-3)
    torch.testing.assert_close(ours.experts.data, torch.stack([m.data for m in matrices]), rtol=0, atol=6e-3)


def test_everything_but_hidden_matrices_is_adamw_bit_for_bit() -> None:
    section = OptimSection(adamw_lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    ours, reference = layers_with_gradients(), layers_with_gradients()
    set_learning_rate(optimizer := build_optimizer(ours, section), 1.0)
    tables = {"params": [reference.embed_tokens.weight, reference.gate.weight, reference.lm_head.weight]}
    vectors = {"params": [reference.tall.bias, reference.norm]}
    theirs = torch.optim.AdamW(
        [{**tables, "weight_decay": 0.1}, {**vectors, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.8, 0.9),
        fused=True,
    )
    for _ in range(3):
        optimizer.step()
        theirs.step()
    for name in ("embed_tokens.weight", "gate.weight", "lm_head.weight", "norm", "tall.bias"):
        assert torch.equal(ours.get_parameter(name), reference.get_parameter(name)), name


def test_which_parameters_muon_takes() -> None:
    taken = {name for name, parameter in Layers().named_parameters() if is_muon_parameter(name, parameter)}
    assert taken == {"wide.weight", "tall.weight", "experts"}
    assert is_muon_parameter("model.layers.1.mlp.experts.gate_up_proj", torch.zeros(2, 4, 4))
    assert is_muon_parameter("model.layers.0.mlp.gate_proj.weight", torch.zeros(4, 4)), "a gate, but not the router"


def test_big_stacks_are_orthogonalized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(max_elements: int) -> torch.Tensor:
        monkeypatch.setattr("speedstack.train.core.optim._MAX_BATCH_ELEMENTS", max_elements)
        parameters = [nn.Parameter(torch.zeros(2, 8, 12)) for _ in range(3)]
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(index))
        Muon([{"params": parameters, "algorithm": "muon", "momentum": 0.9, "lr": 1.0}]).step()
        return torch.stack([parameter.data for parameter in parameters])

    assert torch.equal(run(10**9), run(1))


def test_masters_have_to_be_float32() -> None:
    with pytest.raises(ValueError, match="master weights have to be float32"):
        build_optimizer(Layers().to(torch.bfloat16), OptimSection())
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer(Layers().requires_grad_(False), OptimSection())


def test_schedules() -> None:
    wsd = OptimSection(schedule="wsd", warmup_fraction=0.2, decay_fraction=0.5, final_lr_fraction=0.0)
    assert [learning_rate_factor(wsd, step, 10) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    )
    cosine = OptimSection(schedule="cosine", warmup_fraction=0.0, final_lr_fraction=0.1)
    factors = [learning_rate_factor(cosine, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1.0, abs=1e-3)
    assert factors[100] == pytest.approx(0.1)
    assert factors[1:] == sorted(factors[1:], reverse=True)
    constant = OptimSection(schedule="wsd", warmup_fraction=0.0, decay_fraction=0.0)
    assert {learning_rate_factor(constant, step, 10) for step in range(10)} == {1.0}


def test_fused_gate_and_up_projections_are_two_matrices_each() -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.randn(3, 16, 12))
    gate, up = (nn.Parameter(half.detach().clone()) for half in module.gate_up_proj.chunk(2, dim=1))
    optimizer = build_optimizer(module, OptimSection(name="muon", lr=0.1))
    apart = Muon([{"params": [gate, up], "algorithm": "muon", "momentum": 0.95, "lr": 0.1}])
    module.gate_up_proj.grad = torch.randn(3, 16, 12)
    gate.grad, up.grad = (half.clone() for half in module.gate_up_proj.grad.chunk(2, dim=1))
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    apart.step()
    # bfloat16 products of another batch may be blocked differently
    torch.testing.assert_close(module.gate_up_proj, torch.cat([gate, up], dim=1), rtol=0, atol=2e-3)


def test_a_part_of_a_matrix_decays_like_the_matrix() -> None:
    """ZeRO-3 leaves one-dimensional parts of the parameters of a model that was loaded in parts."""
    model = nn.ParameterDict({"matrix": nn.Parameter(torch.empty(0)), "vector": nn.Parameter(torch.empty(0))})
    model["matrix"].ds_shape = torch.Size((8, 12))  # type: ignore[attr-defined]
    model["vector"].ds_shape = torch.Size((8,))  # type: ignore[attr-defined]
    decayed, kept = build_optimizer(model, OptimSection(name="adamw", weight_decay=0.1)).param_groups
    assert decayed["params"] == [model["matrix"]] and decayed["weight_decay"] == 0.1
    assert kept["params"] == [model["vector"]] and kept["weight_decay"] == 0.0

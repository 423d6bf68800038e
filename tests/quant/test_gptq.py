"""GPTQ against its definition, solved afresh for every column, and what it falls back to."""

from typing import get_args

import pytest
import torch

from speedstack.quant.gptq import gptq, inverse_factor, objective
from speedstack.quant.mxfp4 import BLOCK_SIZE, E2M1_MAGNITUDES, ScaleRule, fake_quantize, quantize

RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)


def random_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def random_hessian(num_experts: int, size: int, num_tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs whose channels correlate and differ in size, as activations do; float64 [E, K, K]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_experts, size, size, generator=generator, dtype=torch.float64) / size**0.5
    mixing *= torch.rand(num_experts, size, 1, generator=generator, dtype=torch.float64) + 0.1
    x = torch.randn(num_experts, num_tokens, size, generator=generator, dtype=torch.float64) @ mixing
    return x.mT @ x / num_tokens


def slow_gptq(w_OK: torch.Tensor, hessian_KK: torch.Tensor, rule: ScaleRule, damping: float) -> torch.Tensor:
    """The definition, a row and a column at a time in float64: each column is rounded, then the columns after it move
    to the minimum of the objective given what is rounded, found by solving for it anew. O(O K^4).

    Every element must lie away from the middle between two grid values, or float32 could round the other way.
    """
    size = hessian_KK.shape[0]
    damped_KK = hessian_KK + damping * hessian_KK.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    out_OK = torch.empty_like(w_OK)
    for row, original_K in enumerate(w_OK.double()):
        w_K = original_K.clone()
        for column in range(size):
            if column % BLOCK_SIZE == 0:
                block = w_K[column : column + BLOCK_SIZE].float()
                scale = 2.0 ** (quantize(block, rule).scales.item() - 127)
            sign = -1.0 if w_K[column] < 0 else 1.0
            distances = [abs(abs(w_K[column].item()) - magnitude * scale) for magnitude in E2M1_MAGNITUDES]
            nearest, second = sorted(range(len(distances)), key=distances.__getitem__)[:2]
            assert distances[second] - distances[nearest] > 1e-5 * scale, "choose another seed"
            w_K[column] = sign * E2M1_MAGNITUDES[nearest] * scale
            rest = slice(column + 1, None)
            if column + 1 < size:
                # Minimum over the rest of (w - w0)^T H (w - w0) with the columns before it fixed.
                shift = damped_KK[rest, : column + 1] @ (w_K - original_K)[: column + 1]
                w_K[rest] = original_K[rest] - torch.linalg.solve(damped_KK[rest, rest], shift)
        out_OK[row] = w_K.float()
    return out_OK


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_equals_the_definition(rule: ScaleRule) -> None:
    w_EOK, hessian_EKK = random_weights(2, 6, 96), random_hessian(2, 96)
    result = gptq(w_EOK, hessian_EKK, rule, damping=0.01)
    assert not result.is_fallback.any()
    for expert in range(2):
        assert torch.equal(result.values[expert], slow_gptq(w_EOK[expert], hessian_EKK[expert], rule, 0.01))
    rtn_EOK = fake_quantize(w_EOK, rule)
    assert (result.values != rtn_EOK).float().mean() > 0.1
    assert (result.errors < 0.8 * result.rtn_errors).all()


def test_search_takes_the_scale_of_least_objective() -> None:
    """One block: whatever fixed exponent a row is given instead, its objective is not smaller."""
    w_OK, hessian_KK = random_weights(8, 32, seed=3), random_hessian(1, 32, seed=4)[0]
    searched = gptq(w_OK[None], hessian_KK[None], "mse", damping=0.0).values[0]
    best = torch.full((8,), torch.inf, dtype=torch.float64)
    floor_scales = quantize(w_OK, "floor").scales.int()
    for step in (-1, 0, 1):
        fixed = _with_scales(w_OK, hessian_KK, floor_scales + step)
        difference = (w_OK - fixed).double()
        best = torch.minimum(best, ((difference @ hessian_KK) * difference).sum(-1))
    difference = (w_OK - searched).double()
    torch.testing.assert_close(((difference @ hessian_KK) * difference).sum(-1), best, rtol=1e-5, atol=0)


def _with_scales(w_OK: torch.Tensor, hessian_KK: torch.Tensor, scales_O1: torch.Tensor) -> torch.Tensor:
    """GPTQ of one block under given scales, by the textbook update with the inverse factor."""
    factor_KK = inverse_factor(hessian_KK[None], 0.0)[0][0]
    scale_O = 2.0 ** (scales_O1[:, 0].double() - 127)
    grid = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float64)
    w_OK = w_OK.double().clone()
    for column in range(w_OK.shape[1]):
        w_O = w_OK[:, column].clone()
        nearest = (w_O.abs()[:, None] - grid * scale_O[:, None]).abs().argmin(-1)
        q_O = torch.copysign(grid[nearest] * scale_O, w_O)
        w_OK[:, column + 1 :] -= ((w_O - q_O) / factor_KK[column, column])[:, None] * factor_KK[column, column + 1 :]
        w_OK[:, column] = q_O
    return w_OK.float()


@pytest.mark.parametrize("rule", RULES)
def test_uncorrelated_inputs_give_rounding_to_nearest(rule: ScaleRule) -> None:
    w_EOK = random_weights(2, 4, 64)
    result = gptq(w_EOK, torch.eye(64, dtype=torch.float64).repeat(2, 1, 1), rule)
    assert torch.equal(result.values, fake_quantize(w_EOK, rule))
    assert result.is_fallback.all()  # it is no better, and nothing is said to be that is not


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stored_with", RULES)
def test_values_are_mxfp4_under_every_rule(rule: ScaleRule, stored_with: ScaleRule) -> None:
    """Whatever rule packs the result, the values that come back are GPTQ's, in float32 and in bfloat16."""
    w_EOK = random_weights(3, 40, 64) * torch.logspace(-30, 30, 40)[:, None]
    values = gptq(w_EOK, random_hessian(3, 64), rule).values
    for dtype in (torch.float32, torch.bfloat16):
        stored = values.to(dtype)
        assert torch.equal(stored.float(), values)
        assert torch.equal(quantize(stored, stored_with).dequantize(), values)
        assert torch.equal(torch.signbit(quantize(stored, stored_with).dequantize()), torch.signbit(values))


def test_weights_in_bfloat16_are_those_values_in_float32() -> None:
    w_EOK, hessian_EKK = random_weights(2, 8, 64).bfloat16(), random_hessian(2, 64)
    assert torch.equal(gptq(w_EOK, hessian_EKK).values, gptq(w_EOK.float(), hessian_EKK).values)


def test_experts_do_not_affect_each_other() -> None:
    w_EOK, hessian_EKK = random_weights(3, 8, 64), random_hessian(3, 64)
    together = gptq(w_EOK, hessian_EKK)
    hessian_EKK[0] = 0.0
    apart = gptq(w_EOK, hessian_EKK)
    assert torch.equal(together.values[1:], apart.values[1:])
    assert apart.is_fallback.tolist() == [True, False, False]


def test_no_inputs_fall_back_to_rounding() -> None:
    w_EOK = random_weights(1, 8, 64)
    result = gptq(w_EOK, torch.zeros(1, 64, 64, dtype=torch.float64))
    assert torch.equal(result.values, fake_quantize(w_EOK))
    assert result.is_fallback.item() and result.damping.isnan().item()
    assert result.errors.item() == result.rtn_errors.item() == result.powers.item() == 0.0


def test_singular_second_moments_are_damped_until_they_factor() -> None:
    """Fewer tokens than inputs and no damping asked for: the retries find some."""
    w_EOK, hessian_EKK = random_weights(1, 8, 64), random_hessian(1, 64, num_tokens=8)
    result = gptq(w_EOK, hessian_EKK, damping=0.0)
    assert 0 < result.damping.item() < 1e-10
    assert result.values.isfinite().all()
    assert result.errors.item() <= result.rtn_errors.item()


def test_a_matrix_that_is_not_positive_falls_back() -> None:
    w_EOK, hessian_EKK = random_weights(2, 8, 64), random_hessian(2, 64)
    hessian_EKK[0, 5, 5] = -100.0
    hessian_EKK[0, 6, 6] = 200.0
    result = gptq(w_EOK, hessian_EKK)
    assert result.is_fallback.tolist() == [True, False]
    assert torch.equal(result.values[0], fake_quantize(w_EOK)[0])


def test_never_worse_than_rounding() -> None:
    for seed in range(8):
        w_EOK, hessian_EKK = random_weights(4, 2, 32, seed=seed), random_hessian(4, 32, seed=seed)
        result = gptq(w_EOK, hessian_EKK, "even", damping=3.0)
        assert (result.errors <= result.rtn_errors).all()
        torch.testing.assert_close(result.errors, objective(w_EOK - result.values, hessian_EKK))


def test_inverse_factor() -> None:
    hessian_EKK = random_hessian(2, 64)
    factor_EKK, damping_E = inverse_factor(hessian_EKK, 0.1)
    mean_E = hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped_EKK = hessian_EKK + 0.1 * mean_E[:, None, None] * torch.eye(64, dtype=torch.float64)
    assert damping_E.tolist() == [0.1, 0.1]
    assert torch.equal(factor_EKK, factor_EKK.triu())
    identity_EKK = torch.eye(64, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(factor_EKK.mT @ factor_EKK @ damped_EKK, identity_EKK)


def test_refusals() -> None:
    w_EOK, hessian_EKK = random_weights(1, 4, 64), random_hessian(1, 64)
    with pytest.raises(ValueError, match="damping must not be negative"):
        gptq(w_EOK, hessian_EKK, damping=-1.0)
    with pytest.raises(ValueError, match="inputs hold NaN or infinity"):
        gptq(w_EOK, hessian_EKK * torch.inf)
    with pytest.raises(ValueError, match="cannot quantize NaN or infinity"):
        gptq(w_EOK * torch.nan, hessian_EKK)
    with pytest.raises(ValueError, match="unknown scale rule"):
        gptq(w_EOK, hessian_EKK, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 32"):
        gptq(random_weights(1, 4, 48), random_hessian(1, 48))


def test_no_exponent_beyond_the_three_searched_is_better() -> None:
    """`mse` looks at X / 2, X and 2 X. 4 X offers nothing that 2 X does not, and at X / 4 the largest element alone
    costs more than all others can gain: a search over every exponent finds the same error.
    """
    w_NK = torch.cat([random_weights(2000, 32), random_weights(2000, 32) ** 3, random_weights(2000, 32).sign()])
    w_NK[0], w_NK[1, 1:] = 0.0, 0.0
    searched = (quantize(w_NK, "mse").dequantize() - w_NK).double().square().sum(-1)
    grid = torch.tensor(E2M1_MAGNITUDES)
    best = torch.full_like(searched, torch.inf)
    for exponent in range(-6, 7):
        scale_N1 = torch.ldexp(
            w_NK.abs().amax(-1, keepdim=True).clamp_min(1e-30).log2().floor().exp2(), torch.tensor(exponent)
        )
        nearest = (w_NK.abs()[..., None] - grid * scale_N1[..., None]).abs().amin(-1)
        best = torch.minimum(best, nearest.double().square().sum(-1))
    torch.testing.assert_close(searched, best, rtol=1e-6, atol=0)

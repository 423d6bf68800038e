"""GPTQ (arXiv 2210.17323) to MXFP4: columns are rounded in turn, and later columns compensate for earlier errors.

For a matrix W and second moment H = mean of x x^T, the objective is tr((W - Q) H (W - Q)^T), the mean squared output
error. With H^-1 = U^T U, U upper triangular, column k's error / U[k, k] times U[k, k + 1:] is subtracted from the later
columns; the squared errors sum to the objective. All experts and rows go together, columns one by one inside a block of
32, later blocks by one product.

A block's scale is chosen at its turn, from compensated weights, as in MR-GPTQ (arXiv 2509.23202); its rotations are
left out, because no loader of ours, nor vLLM's, rotates expert inputs. With rule `mse` each row takes the scale among X
/ 2, X, 2 X with the least *objective* over the block.

Left out: activation order, which needs all scales before the first column.

Shape suffixes: E experts, O outputs, K inputs (contraction), B = 32 columns of a block, R columns after it, C
candidates for a scale.
"""

from dataclasses import dataclass

import torch

from speedstack.quant.mxfp4 import (
    BLOCK_SIZE,
    DEFAULT_SCALE_RULE,
    ScaleRule,
    fake_quantize,
    scale_bytes,
    snap,
)

DEFAULT_DAMPING = 0.01
# Damping factor per retry of a factorization.
_RETRY_FACTOR = 10.0
_NUM_RETRIES = 3


@dataclass(frozen=True, eq=False)
class GptqResult:
    """A quantized stack [E, O, K] and its error on the calibration inputs.

    values: float32 [E, O, K], exactly MXFP4: `quantize` returns them under any scale rule.
    errors, rtn_errors: float64 [E], the objective of `values` and of rounding to nearest; `powers`: tr(W H W^T).
    damping: float64 [E], the damping that made H positive definite; NaN if none did.
    is_fallback: bool [E], rounded to nearest because it is better or GPTQ failed.
    """

    values: torch.Tensor
    errors: torch.Tensor
    rtn_errors: torch.Tensor
    powers: torch.Tensor
    damping: torch.Tensor
    is_fallback: torch.Tensor


@torch.no_grad()
def gptq(
    w_EOK: torch.Tensor,
    hessian_EKK: torch.Tensor,
    scale_rule: ScaleRule = DEFAULT_SCALE_RULE,
    damping: float = DEFAULT_DAMPING,
) -> GptqResult:
    """Quantizes float32 or bfloat16 [E, O, K] for inputs with second moments `hessian_EKK` (float64).

    `damping` times the mean of H's diagonal is added to it; after a failed factorization ten times as much, up to three
    times. An expert not better than rounding to nearest, such as one with H = 0, is rounded to nearest. Raises
    ValueError as `quantize`, for a negative damping, and for NaN or infinity in H.
    """
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    if not torch.isfinite(hessian_EKK).all():
        raise ValueError("the experts' inputs hold NaN or infinity: calibrate in float32 or bfloat16, check the model")
    rtn_EOK = fake_quantize(w_EOK.float(), scale_rule)
    if rtn_EOK.isnan().any():
        raise ValueError("cannot quantize NaN or infinity to MXFP4: check the weights (a diverged run, a bad download)")
    factor_EKK, damping_E = inverse_factor(hessian_EKK, damping)
    values_EOK = _round_columns(w_EOK.float(), factor_EKK.float(), scale_rule)
    errors_E, rtn_errors_E = (objective(w_EOK - q_EOK, hessian_EKK) for q_EOK in (values_EOK, rtn_EOK))
    is_fallback_E = ~(errors_E < rtn_errors_E) | damping_E.isnan()
    return GptqResult(
        values=torch.where(is_fallback_E[:, None, None], rtn_EOK, values_EOK),
        errors=torch.where(is_fallback_E, rtn_errors_E, errors_E),
        rtn_errors=rtn_errors_E,
        powers=objective(w_EOK.float(), hessian_EKK),
        damping=damping_E,
        is_fallback=is_fallback_E,
    )


def objective(difference_EOK: torch.Tensor, hessian_EKK: torch.Tensor) -> torch.Tensor:
    """tr(D H D^T) of each expert; float64 [E]."""
    difference_EOK = difference_EOK.double()
    return (difference_EOK @ hessian_EKK).mul_(difference_EOK).sum((-2, -1))


def inverse_factor(hessian_EKK: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular U [E, K, K] with U^T U = (H + damping mean(diag H) I)^-1, float64, and the damping [E].

    If no damping helps, U is the identity and the damping NaN.
    """
    num_experts, size, _ = hessian_EKK.shape
    identity_KK = torch.eye(size, dtype=hessian_EKK.dtype, device=hessian_EKK.device)
    mean_E = hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(-1)
    factor_EKK = identity_KK.repeat(num_experts, 1, 1)
    damping_E = torch.full_like(mean_E, torch.nan)
    for attempt in range(1 + _NUM_RETRIES):
        pending_E = (damping_E.isnan() & (mean_E > 0)).nonzero().squeeze(-1)
        if not len(pending_E):
            break
        tried = max(damping, torch.finfo(hessian_EKK.dtype).eps if attempt else 0.0) * _RETRY_FACTOR**attempt
        damped_EKK = hessian_EKK[pending_E] + tried * mean_E[pending_E, None, None] * identity_KK
        # H = R R^T with upper triangular R is a Cholesky factorization from the last column; U is R^-1.
        lower_EKK, info_E = torch.linalg.cholesky_ex(damped_EKK.flip(-2, -1))
        upper_EKK = torch.linalg.solve_triangular(lower_EKK.flip(-2, -1), identity_KK, upper=True)
        is_good_E = (info_E == 0) & upper_EKK.isfinite().all(-1).all(-1)
        factor_EKK[pending_E[is_good_E]] = upper_EKK[is_good_E]
        damping_E[pending_E[is_good_E]] = tried
    return factor_EKK, damping_E


def _round_columns(w_EOK: torch.Tensor, factor_EKK: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
    """`gptq` without checks; float32 [E, O, K]."""
    w_EOK = w_EOK.clone()
    for start in range(0, w_EOK.shape[-1], BLOCK_SIZE):
        end = start + BLOCK_SIZE
        w_EOB = w_EOK[..., start:end].contiguous()
        scales_CEO = _candidate_scales(w_EOB, scale_rule)
        q_CEOB, errors_CEOB = _round_block(w_EOB, scales_CEO, factor_EKK[:, start:end, start:end])
        best_EO = errors_CEOB.double().square_().sum(-1).argmin(0)
        best_CEOB = best_EO[None, :, :, None].expand(-1, -1, -1, BLOCK_SIZE)
        errors_EOB = errors_CEOB.gather(0, best_CEOB)[0]
        w_EOK[..., start:end] = q_CEOB.gather(0, best_CEOB)[0]
        w_EOK[..., end:] -= errors_EOB @ factor_EKK[:, start:end, end:]
    return w_EOK


def _candidate_scales(w_EOB: torch.Tensor, scale_rule: ScaleRule) -> torch.Tensor:
    """E8M0 candidates for a block's scale, int32 [C, E, O]: the rule's own, or those that `mse` searches."""
    if scale_rule != "mse":
        return scale_bytes(w_EOB, scale_rule)[None]
    floor_EO = scale_bytes(w_EOB, "floor")
    return torch.stack([floor_EO, floor_EO + 1, (floor_EO - 1).clamp_(min=0)])


def _round_block(
    w_EOB: torch.Tensor, scales_CEO: torch.Tensor, factor_EBB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block under each candidate: values, and errors divided by U's diagonal, [C, E, O, B]."""
    w_CEOB = w_EOB.repeat(len(scales_CEO), 1, 1, 1)
    errors_CEOB = torch.empty_like(w_CEOB)
    for column in range(BLOCK_SIZE):
        w_CEO1 = w_CEOB[..., column : column + 1].contiguous()
        q_CEO1 = snap(w_CEO1, scales_CEO)
        error_CEO1 = (w_CEO1 - q_CEO1) / factor_EBB[:, column : column + 1, column : column + 1]
        w_CEOB[..., column + 1 :] -= error_CEO1 * factor_EBB[:, column : column + 1, column + 1 :]
        w_CEOB[..., column : column + 1] = q_CEO1
        errors_CEOB[..., column : column + 1] = error_CEO1
    return w_CEOB, errors_CEOB

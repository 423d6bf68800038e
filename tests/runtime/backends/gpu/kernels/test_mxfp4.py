"""MXFP4 in the Triton kernels alone: every code under every scale, and products at sizes that fill nothing.

What a GPU decodes with is assembly, which the interpreter does not know: here the few instructions that it is made of
are carried out in PyTorch.

Legend: R rows, S scales, N words.
"""

import re

import pytest
import torch

from speedstack.quant.mxfp4 import MXFP4Tensor, dequantize_reference, quantize

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.bindings.layers import LARGEST_NARROW_SCALE, SLICE
from speedstack.runtime.backends.gpu.kernels.layers.matmul_mxfp4 import (
    NARROW,
    WIDE,
    bfloat16_factor,
    decoded,
    experts_sum_mxfp4,
    multiply_pair_mxfp4,
)
from speedstack.runtime.plan.record_layout import EXPERT, NUM_ACTIVE, route_words
from tests.runtime.backends.gpu.launch import Launcher

R = 4


def all_codes_and_scales() -> tuple[torch.Tensor, torch.Tensor]:
    """Words of codes, int32 [256 scales, 256]: each byte in all four places, with other bytes beside it; the scales."""
    byte = torch.arange(256, dtype=torch.uint8)
    words = torch.stack([byte, byte.flip(0), byte * 3, byte * 5 + 7], dim=-1).view(torch.int32).flatten()
    scales = torch.arange(256, dtype=torch.uint8)
    return words.expand(256, 256).contiguous(), scales


def expected_of(words_SN: torch.Tensor, scales_S: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[scales, words, 8], by the one definition of MXFP4."""
    codes = words_SN.view(torch.uint8).reshape(len(scales_S), -1, 16)
    scales = scales_S[:, None, None].expand(-1, codes.shape[1], 1)
    values = dequantize_reference(MXFP4Tensor(codes.contiguous(), scales.contiguous()), dtype)
    return values.reshape(len(scales_S), -1, 8)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for which NaN it is."""
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    words = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(found[is_number].view(words), expected[is_number].view(words))


@triton.jit
def decode_kernel(words_ptr, scales_ptr, out_ptr, factors_ptr, N: tl.constexpr, IS_WIDE: tl.constexpr):
    s_N = tl.arange(0, N)
    at_NN = s_N[:, None] * N + s_N[None, :]
    scale_N = tl.load(scales_ptr + s_N).to(tl.int32)
    values = decoded(tl.load(words_ptr + at_NN), scale_N[:, None], IS_WIDE)
    for code in tl.static_range(8):
        tl.store(out_ptr + at_NN * 8 + code, values[code])
    tl.store(factors_ptr + s_N, bfloat16_factor(scale_N, IS_WIDE))


def execute(ptx: str, word: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What the assembly makes of words and factors, int32: bfloat16 [.., 8]."""

    def as_bfloat16(bits: torch.Tensor) -> torch.Tensor:
        return (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.bfloat16).unflatten(-1, (-1, 2))

    registers = {"$8": word.long() & 0xFFFFFFFF, "$9": factor.long() & 0xFFFFFFFF}
    out: dict[int, torch.Tensor] = {}

    def value(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.full_like(registers["$8"], int(name))

    for line in re.findall(r"[^;{}\n]*(?:\{\$\d, \$\d\}[^;]*)?;", ptx):
        operation, *names = re.sub(r"[;{},]", " ", line).split()
        if operation == ".reg":
            continue
        if operation == "and.b32":
            registers[names[0]] = value(names[1]) & value(names[2])
        elif operation == "shr.u32":
            registers[names[0]] = value(names[1]) >> int(names[2])
        elif operation == "mul.lo.u32":
            registers[names[0]] = (value(names[1]) * value(names[2])) & 0xFFFFFFFF
        elif operation == "mul.rn.bf16x2":
            product = as_bfloat16(value(names[1])) * as_bfloat16(value(names[2]))
            registers[names[0]] = product.flatten(-2).view(torch.int32).long() & 0xFFFFFFFF
        elif operation == "mov.b32" and len(names) == 3:
            pair = as_bfloat16(value(names[2]))
            out |= {int(name[1:]): pair[..., half] for half, name in enumerate(names[:2])}
        else:
            assert operation == "mov.b32", line
            registers[names[0]] = value(names[1])
    return torch.stack([out[place] for place in range(8)], dim=-1)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("is_wide", [False, True])
def test_every_code_is_decoded_exactly_under_every_scale(is_wide: bool, launch: Launcher) -> None:
    """By the plain arithmetic and by the assembly; without `is_wide` up to the largest scale that this is for."""
    words_SN, scales_S = all_codes_and_scales()
    found, factors = torch.empty(256, 256, 8), torch.empty(256, dtype=torch.int32)
    launch(decode_kernel, (1,), words_SN, scales_S, found, factors, N=256, IS_WIDE=is_wide)
    expected = expected_of(words_SN, scales_S, torch.float32)
    assert expected[255].isnan().all() and expected[254].isinf().any()
    num_scales = 256 if is_wide else LARGEST_NARROW_SCALE + 1
    if launch.device.type == "cpu":
        assert_same_bits(found, expected)
    else:  # the assembly itself
        decoded_SN8 = expected_of(words_SN, scales_S, torch.bfloat16).float()
        assert_same_bits(found[:num_scales], decoded_SN8[:num_scales])
    ptx = (WIDE if is_wide else NARROW).value
    in_assembly = execute(ptx, words_SN, factors[:, None].expand(256, 256))[:num_scales]
    in_bfloat16 = expected_of(words_SN, scales_S, torch.bfloat16)[:num_scales]
    assert_same_bits(in_assembly, in_bfloat16)
    if not is_wide:
        beyond = execute(ptx, words_SN, factors[:, None].expand(256, 256))[num_scales]
        assert not torch.equal(beyond, expected_of(words_SN, scales_S, torch.bfloat16)[num_scales])
        broken = execute(
            ptx.replace(str((1 << 2) + (1 << 8)), str(1 << 2)), words_SN, factors[:, None].expand(256, 256)
        )
        assert not torch.equal(broken[:num_scales], in_bfloat16), "a sign that is lost is seen"


@triton.jit
def multiply_kernel(
    x_ptr, codes_ptr, scales_ptr, out_ptr, row, num_rows, step, x_step, x_row_step, K: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    r_R, t_T = tl.arange(0, R), tl.arange(0, T)
    out_ptrs = out_ptr + t_T[:, None] * R + r_R[None, :]
    found = multiply_pair_mxfp4(
        x_ptr, x_step, r_R * x_row_step, r_R != 1, codes_ptr, scales_ptr, row, num_rows, step, K, T, SLICES, False
    )
    tl.store(out_ptrs, found[0])
    tl.store(out_ptrs + T * R, found[1])


@pytest.mark.parametrize(("K", "slices"), [(96, 1), (2 * SLICE, 2), (5 * SLICE - 32, 4), (704, 2)])
def test_products_are_those_of_the_decoded_weights(K: int, slices: int, launch: Launcher) -> None:
    """Rows of the step in either layout, one of which is left out; a tile that is cut; two products at once."""
    T, generator = 16, torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(40, K, generator=generator))
    weight.scales[[16, 37]] = 255  # behind the last rows: whoever reads on there gets what is no number
    x_RK = torch.randn(R, K, generator=generator)
    x, x_step, x_row_step = x_RK, 16, K
    if K == 96:
        x, x_step, x_row_step = x_RK.unflatten(1, (-1, 16)).transpose(0, 1).contiguous(), R * 16, 16
    found = torch.zeros(2, T, R)
    pointers = (x, weight.codes, weight.scales, found)
    launch(multiply_kernel, (1,), *pointers, 3, 13, 21, x_step, x_row_step, K=K, T=T, R=R, SLICES=slices)
    x_RK[1] = 0.0
    expected = weight.dequantize() @ x_RK.T
    # sums of up to 704 in another order
    torch.testing.assert_close(found[0, :13], expected[3:16], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1, :13], expected[24:37], rtol=1e-5, atol=1e-4)


@triton.jit
def experts_kernel(
    x_ptr, routes_ptr, num_experts, codes_ptr, scales_ptr, out_ptr, first, N: tl.constexpr, K: tl.constexpr,
    TOP_K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    sum_TR = experts_sum_mxfp4(
        x_ptr, routes_ptr, num_experts, codes_ptr, scales_ptr, first, N, K, TOP_K, T, R, SLICES, IS_WIDE
    )
    tl.store(out_ptr + tl.arange(0, T)[:, None] * R + tl.arange(0, R)[None, :], sum_TR)


def records_of(experts_RK: torch.Tensor, weights_RK: torch.Tensor, used: list[int]) -> tuple[torch.Tensor, int]:
    """Of the experts that rows in use chose, ascending, and behind them one that leads outside; how many there are."""
    num_rows, active = len(experts_RK), sorted(set(experts_RK[used].flatten().tolist()))
    routes = torch.full((len(active) + 1, route_words(num_rows)), 2**30, dtype=torch.int32)
    for record, expert in zip(routes, active, strict=False):
        record[:num_rows], record[num_rows : 2 * num_rows] = -1, 0
        record[2 * num_rows + EXPERT], record[2 * num_rows + NUM_ACTIVE] = expert, len(active)
        for row in used:
            for choice in (experts_RK[row] == expert).nonzero().flatten().tolist():
                record[row], record[num_rows + row] = choice, weights_RK[row, choice].view(torch.int32)
    return routes, len(active)


@pytest.mark.parametrize(("K", "slices", "num_rows"), [(96, 1, 4), (768, 8, 16), (5 * SLICE - 32, 2, 16)])
def test_experts_are_added_up_with_the_weights_of_their_rows(
    K: int, slices: int, num_rows: int, launch: Launcher
) -> None:
    """Rows that share experts or do not, one that is idle; a tile that is cut. Alone, a row has the same bits, though
    the others chose an expert without numbers: only by a scale that is decoded as all scales may be."""
    N, E, top_k, T, first = 21, 6, 3, 16, 8
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(E, N, K, generator=generator))
    experts_RK = torch.rand(num_rows, E, generator=generator).topk(top_k).indices
    experts_RK[0], experts_RK[2] = torch.tensor([4, 1, 3]), torch.tensor([3, 0, 2])
    weights_RK = torch.rand(num_rows, top_k, generator=generator)
    act_RKI = torch.randn(num_rows, top_k, K, generator=generator)
    x_RKI = act_RKI.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).contiguous()
    x_RKI[3] = float("nan")  # the idle row's

    def run(used: list[int], is_wide: bool) -> torch.Tensor:
        routes, num_experts = records_of(experts_RK, weights_RK, used)
        found = torch.zeros(T, num_rows)
        launch(
            experts_kernel, (1,), x_RKI, routes, num_experts, weight.codes, weight.scales, found, first, N=N, K=K,
            TOP_K=top_k, T=T, R=num_rows, SLICES=slices, IS_WIDE=is_wide,
        )  # fmt: skip
        return found[: N - first]

    used = [row for row in range(num_rows) if row != 3]
    found_NR = run(used, is_wide=False)
    terms_RKN = torch.einsum("rkni,rki->rkn", weight.dequantize().double()[experts_RK], act_RKI.double())
    expected_NR = (terms_RKN * weights_RK[..., None]).sum(1).T[first:]
    # float32 sums of up to 3 * 768 products
    torch.testing.assert_close(found_NR[:, used], expected_NR[:, used].float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(run(used, is_wide=True), found_NR)
    assert (found_NR[:, 3] == 0).all() and (run([], is_wide=False) == 0).all()
    for row in (0, 2):
        assert torch.equal(run([row], is_wide=False)[:, row], found_NR[:, row])
    weight.scales[2] = 255
    assert run(used, is_wide=True)[:, 2].isnan().all()
    assert torch.equal(run(used, is_wide=True)[:, 0], found_NR[:, 0])


def test_large_scales_are_noticed_when_weights_are_bound() -> None:
    """They are decoded by two products, which only those weights pay for."""
    from speedstack.runtime.backends.gpu.base import formats_of
    from speedstack.runtime.backends.gpu.bindings.layers import bind
    from speedstack.runtime.backends.gpu.buffers import Memory
    from speedstack.runtime.plan.step import build_plan
    from tests.runtime.backends.gpu.plan_cases import CASES

    weights = CASES["qwen3-mxfp4"]()
    plan = build_plan(weights.spec, formats_of(weights), 2, R, 32)
    experts = weights.layers[0].mlp.gate_up_EID  # type: ignore[union-attr]
    assert isinstance(experts, MXFP4Tensor)
    for scale, is_wide in ((LARGEST_NARROW_SCALE, False), (LARGEST_NARROW_SCALE + 1, True), (255, True)):
        experts.scales[-1, -1, -1] = scale
        found = {
            b.phase.name: b.constants.IS_WIDE
            for b in bind(plan, weights, Memory(plan, weights, 1, 32))
            if "IS_WIDE" in b.constants.values
        }
        assert {name for name, value in found.items() if value} == ({"L00.gate_up"} if is_wide else set())
        assert len(found) == 2 * len(weights.layers)

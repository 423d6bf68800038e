"""MXFP4 in the Triton kernels alone: every code under every scale, and products at sizes that fill nothing.

Started by test_graph.py in a process that interprets. What a GPU decodes with is assembly, which the interpreter does
not know: here the few instructions that it is made of are carried out in PyTorch.

Legend: R rows, S scales, N words.
"""

import os
import re

import pytest
import torch

from speedstack.quant.mxfp4 import MXFP4Tensor, dequantize_reference, quantize

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the process that interprets", allow_module_level=True)

import triton
import triton.language as tl

from speedstack.runtime.bindings import LARGEST_NARROW_SCALE, SLICE
from speedstack.runtime.kernels.triton.mxfp4 import NARROW, WIDE, bfloat16_factor, decoded, multiply_mxfp4

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
def test_every_code_is_decoded_exactly_under_every_scale(is_wide: bool) -> None:
    """By the plain arithmetic and by the assembly; without `is_wide` up to the largest scale that this is for."""
    words_SN, scales_S = all_codes_and_scales()
    found, factors = torch.empty(256, 256, 8), torch.empty(256, dtype=torch.int32)
    decode_kernel[(1,)](words_SN, scales_S, found, factors, N=256, IS_WIDE=is_wide)
    expected = expected_of(words_SN, scales_S, torch.float32)
    assert expected[255].isnan().all() and expected[254].isinf().any()
    assert_same_bits(found, expected)
    num_scales = 256 if is_wide else LARGEST_NARROW_SCALE + 1
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
    R: tl.constexpr, SLICES: tl.constexpr, IS_PAIR: tl.constexpr,
):  # fmt: skip
    r_R, t_T = tl.arange(0, R), tl.arange(0, T)
    out_ptrs = out_ptr + t_T[:, None] * R + r_R[None, :]
    found = multiply_mxfp4(
        x_ptr, x_step, r_R * x_row_step, r_R != 1, codes_ptr, scales_ptr, row, num_rows, step, K, T, SLICES, False,
        IS_PAIR,
    )  # fmt: skip
    if IS_PAIR:
        tl.store(out_ptrs, found[0])
        tl.store(out_ptrs + T * R, found[1])
    else:
        tl.store(out_ptrs, found)


@pytest.mark.parametrize(("K", "slices", "is_pair"), [
    (96, 1, True), (2 * SLICE, 2, False), (5 * SLICE - 32, 4, True), (704, 2, False),
])  # fmt: skip
def test_products_are_those_of_the_decoded_weights(K: int, slices: int, is_pair: bool) -> None:
    """Rows of the step in either layout, one of which is left out; a tile that is cut; two products at once."""
    T, generator = 16, torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(40, K, generator=generator))
    weight.scales[[16, 37]] = 255  # behind the last rows: whoever reads on there gets what is no number
    x_RK = torch.randn(R, K, generator=generator)
    x, x_step, x_row_step = x_RK, 16, K
    if is_pair:
        x, x_step, x_row_step = x_RK.unflatten(1, (-1, 16)).transpose(0, 1).contiguous(), R * 16, 16
    found = torch.zeros(2, T, R)
    multiply_kernel[(1,)](
        x, weight.codes, weight.scales, found, 3, 13, 21, x_step, x_row_step, K=K, T=T, R=R, SLICES=slices,
        IS_PAIR=is_pair,
    )  # fmt: skip
    x_RK[1] = 0.0
    expected = weight.dequantize() @ x_RK.T
    # sums of up to 704 in another order
    torch.testing.assert_close(found[0, :13], expected[3:16], rtol=1e-5, atol=1e-4)
    if is_pair:
        torch.testing.assert_close(found[1, :13], expected[24:37], rtol=1e-5, atol=1e-4)


def test_large_scales_are_noticed_when_weights_are_bound() -> None:
    """They are decoded by two products, which only those weights pay for."""
    from speedstack.runtime.bindings import bind
    from speedstack.runtime.memory import Memory
    from speedstack.runtime.phases import build_plan
    from speedstack.runtime.plan_backend import formats_of
    from tests.runtime.plan_cases import CASES

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

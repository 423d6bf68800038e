"""MXFP4 against a slow reference written from the definition, value by value and byte by byte."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import get_args

import hypothesis.extra.numpy as hypothesis_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedstack.quant.mxfp4 import (
    BLOCK_SIZE,
    E2M1_MAGNITUDES,
    E2M1_VALUES,
    MXFP4Tensor,
    ScaleRule,
    dequantize,
    fake_quantize,
    quantize,
)

SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
FLOAT32_MAX = torch.finfo(torch.float32).max


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Compares signed zeros and NaN payloads too."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def slow_code(value: float, scale: Fraction) -> int:
    """Nearest code by exact arithmetic over all eight magnitudes; the tie goes to the even code; 6 catches the rest."""
    magnitude = abs(Fraction(value)) / scale
    distances = [
        (abs(magnitude - Fraction(candidate)), code % 2, code) for code, candidate in enumerate(E2M1_MAGNITUDES)
    ]
    return min(distances)[2] + (8 if math.copysign(1.0, value) < 0 else 0)


def slow_error(block: list[float], scale: Fraction) -> Fraction:
    values = [Fraction(E2M1_VALUES[slow_code(value, scale)]) * scale for value in block]
    return sum(((Fraction(value) - q) ** 2 for value, q in zip(block, values, strict=True)), Fraction(0))


def slow_scale_byte(block: list[float], scale_rule: ScaleRule) -> int:
    """The rules as their definitions read, in exact rational arithmetic."""
    amax = max(abs(Fraction(value)) for value in block)
    if amax == 0:
        return 0
    exponent = -200  # floor(log2(amax))
    while Fraction(2) ** (exponent + 1) <= amax:
        exponent += 1
    floor_byte = exponent - 2 + 127
    if scale_rule == "even":
        floor_byte += amax >= Fraction(7, 4) * Fraction(2) ** exponent
    if scale_rule == "rceil":
        floor_byte += amax > 6 * Fraction(2) ** (exponent - 2)
    byte = min(max(floor_byte, 0), 252)
    if scale_rule != "mse":
        return byte
    candidates = [byte] + [min(max(byte + step, 0), 252) for step in (1, -1)]
    return min(candidates, key=lambda candidate: slow_error(block, Fraction(2) ** (candidate - 127)))


def slow_quantize(block: list[float], scale_rule: ScaleRule) -> tuple[list[int], int]:
    byte = slow_scale_byte(block, scale_rule)
    return [slow_code(value, Fraction(2) ** (byte - 127)) for value in block], byte


def unpack(tensor: MXFP4Tensor) -> list[int]:
    return [code for byte in tensor.codes.flatten().tolist() for code in (byte & 15, byte >> 4)]


def check_against_slow(block: torch.Tensor, scale_rule: ScaleRule) -> None:
    packed = quantize(block, scale_rule)
    codes, byte = slow_quantize(block.tolist(), scale_rule)
    assert packed.scales.tolist() == [byte]
    assert unpack(packed) == codes
    expected = torch.tensor([float(Fraction(E2M1_VALUES[code]) * Fraction(2) ** (byte - 127)) for code in codes])
    expected = expected.copysign(block)
    assert torch.equal(bits(packed.dequantize()), bits(expected))
    assert torch.equal(bits(fake_quantize(block, scale_rule)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_all_codes_all_scales(dtype: torch.dtype) -> None:
    codes_K = torch.arange(16, dtype=torch.uint8).repeat(2)
    codes = (codes_K[0::2] | (codes_K[1::2] << 4)).expand(256, -1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    values = dequantize(MXFP4Tensor(codes, scales), dtype)
    assert values.dtype == dtype
    # Doubles hold every product, overflow of the target dtype (bytes 253 and 254) included.
    expected = (
        torch.tensor(E2M1_VALUES * 2, dtype=torch.float64) * torch.exp2(torch.arange(255).double() - 127)[:, None]
    )
    assert torch.equal(bits(values[:255]), bits(expected.to(dtype)))
    assert torch.equal(values[:253].double(), expected[:253])
    assert values[255].isnan().all()


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_values_survive_every_rule(scale_rule: ScaleRule, dtype: torch.dtype) -> None:
    """All 16 codes at all scales come back as they were: fake-quant equals pack, then unpack, and changes nothing."""
    codes = torch.arange(16, dtype=torch.uint8) * 0x11  # each code in both nibbles
    scales = torch.arange(253, dtype=torch.uint8)[:, None]
    values = MXFP4Tensor(codes.expand(253, -1).contiguous(), scales).dequantize(dtype)
    assert torch.equal(bits(quantize(values, scale_rule).dequantize(dtype)), bits(values))
    assert torch.equal(bits(fake_quantize(values, scale_rule)), bits(values))


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_single_codes_survive_every_rule(scale_rule: ScaleRule) -> None:
    """Blocks of one repeated code, where the rule may choose another scale for the same value."""
    codes = (torch.arange(16, dtype=torch.uint8) * 0x11)[:, None, None].expand(16, 253, 16).contiguous()
    scales = torch.arange(253, dtype=torch.uint8)[None, :, None].expand(16, 253, 1).contiguous()
    values = MXFP4Tensor(codes, scales).dequantize()
    assert torch.equal(bits(quantize(values, scale_rule).dequantize()), bits(values))
    assert torch.equal(bits(fake_quantize(values, scale_rule)), bits(values))


def test_bytes_are_stable_under_requantization() -> None:
    """The default rule writes the same bytes again, so saving a loaded checkpoint changes no file."""
    packed = quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    again = quantize(packed.dequantize())
    assert torch.equal(packed.codes, again.codes) and torch.equal(packed.scales, again.scales)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("exponent", [-127, -100, -8, 0, 3, 100])
def test_midpoints_go_to_the_even_code(scale_rule: ScaleRule, exponent: int) -> None:
    """Every midpoint, its neighbours on both sides, and both signs; 4.0 and 6.0 pin the scale at 2**exponent."""
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    around = [math.nextafter(m, to) for m in midpoints for to in (0.0, 9.0)] + midpoints
    values = torch.tensor(around, dtype=torch.float32)
    ulp = torch.tensor(2.0**-20)
    pool = torch.cat([values, values + ulp, values - ulp])
    pool = torch.cat([pool, -pool])
    for chunk in pool.split(BLOCK_SIZE - 4):
        block = torch.zeros(BLOCK_SIZE)
        block[0], block[1], block[2], block[3] = 4.0, 6.0, -0.0, 0.0
        block[4 : 4 + len(chunk)] = chunk
        check_against_slow(block * 2.0**exponent, scale_rule)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_scale_thresholds(scale_rule: ScaleRule) -> None:
    """Largest magnitudes at and next to 1.5 and 1.75 times a power of two, and at both ends of float32."""
    for exponent in (-149, -148, -128, -127, -126, -125, -124, -1, 0, 125, 126, 127):
        for mantissa in (1.0, 1.5, 1.75, 2.0 - 2.0**-23):
            amax = torch.tensor(mantissa, dtype=torch.float64).mul(2.0**exponent).float()
            for value in (
                amax,
                torch.nextafter(amax, torch.tensor(0.0)),
                torch.nextafter(amax, torch.tensor(math.inf)),
            ):
                if value > FLOAT32_MAX:
                    continue
                block = torch.linspace(-1, 1, BLOCK_SIZE) * value
                block[7] = value
                check_against_slow(block, scale_rule)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_zero_blocks(scale_rule: ScaleRule) -> None:
    block = torch.zeros(2, BLOCK_SIZE)
    block[1] = -0.0
    packed = quantize(block, scale_rule)
    assert packed.scales.tolist() == [[0], [0]]
    assert packed.codes[0].unique().tolist() == [0x00]
    assert packed.codes[1].unique().tolist() == [0x88]
    assert torch.equal(bits(packed.dequantize()), bits(block))


def test_small_negatives_become_negative_zero() -> None:
    block = torch.zeros(BLOCK_SIZE)
    block[0], block[1] = 4.0, -1e-3
    packed = quantize(block)
    assert packed.codes[0] == 0x86
    assert torch.signbit(packed.dequantize()[1])


def test_nibble_order_and_bytes() -> None:
    """Fixed bytes, so that a change of layout cannot hide behind a matching reader."""
    block = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.3] * 2)
    packed = quantize(block)
    assert packed.scales.tolist() == [127]
    assert packed.codes.tolist() == [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x1F] * 2


blocks = hypothesis_numpy.arrays(
    np.float32,
    BLOCK_SIZE,
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
)
close_blocks = st.tuples(
    hypothesis_numpy.arrays(np.float32, BLOCK_SIZE, elements=st.floats(-8, 8, width=32)),
    st.integers(-140, 120),
).map(lambda pair: np.ldexp(pair[0], pair[1]).astype(np.float32))


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(block=st.one_of(blocks, close_blocks))
def test_any_block_equals_slow_reference(scale_rule: ScaleRule, block: np.ndarray) -> None:
    check_against_slow(torch.from_numpy(block.copy()), scale_rule)


def test_mse_clips_one_outlier_for_the_rest() -> None:
    """At X = 1 the 31 small elements vanish (error 31 / 16); at X / 2 they are exact and 4 becomes 3 (error 1)."""
    block = torch.full((BLOCK_SIZE,), 0.25)
    block[0] = 4.0
    assert quantize(block, "mse").scales.tolist() == [126]
    check_against_slow(block, "mse")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(block=close_blocks)
def test_no_rule_beats_mse(block: np.ndarray) -> None:
    """`mse` looks at every scale the other rules can choose."""
    w = torch.from_numpy(block.copy())
    errors = {rule: (fake_quantize(w, rule).double() - w.double()).square().sum() for rule in SCALE_RULES}
    # The sums run in another order here: allow the last places of float64.
    assert errors["mse"] <= min(errors.values()) * (1 + 1e-12)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_equals_pack_then_unpack(scale_rule: ScaleRule, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-130, 120, (4, 16, 1), generator=generator).float()
    w = (torch.randn(4, 16, 256, generator=generator) * torch.exp2(exponents)).to(dtype)
    faked = fake_quantize(w, scale_rule)
    assert faked.dtype == dtype
    assert torch.equal(bits(faked), bits(quantize(w, scale_rule).dequantize(dtype)))
    # Non-contiguous input, and one tensor at a time, give the same values.
    assert torch.equal(fake_quantize(w.transpose(0, 1), scale_rule), faked.transpose(0, 1))
    assert torch.equal(torch.stack([fake_quantize(part, scale_rule) for part in w]), faked)


def test_gradient_is_straight_through() -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    upstream = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    fake_quantize(w).backward(upstream)
    assert w.grad is not None and torch.equal(w.grad, upstream)


def test_input_is_not_written_to() -> None:
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    before = w.clone()
    fake_quantize(w, "mse")
    quantize(w, "mse")
    assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_non_finite(bad: float, scale_rule: ScaleRule) -> None:
    w = torch.ones(2, 64)
    w[1, 40] = bad
    with pytest.raises(ValueError, match="cannot quantize NaN or infinity"):
        quantize(w, scale_rule)
    faked = fake_quantize(w, scale_rule)
    assert faked[1, 32:].isnan().all()
    assert torch.equal(faked[0], w[0]) and torch.equal(faked[1, :32], w[1, :32])


@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_bad_arguments(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="multiple of 32, got shape \\(2, 33\\)"):
        function(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="multiple of 32"):
        function(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="multiple of 32"):
        function(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float16"):
        function(torch.zeros(2, 32, dtype=torch.float16))
    with pytest.raises(ValueError, match="unknown scale rule 'ceil': choose one of floor, rceil, even, mse"):
        function(torch.zeros(2, 32), "ceil")


def test_mxfp4_tensor() -> None:
    packed = quantize(torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5)))
    assert packed.shape == (3, 5, 64)
    assert packed.nbytes * 8 == 3 * 5 * 64 * 4.25
    moved = packed.to("cpu")
    assert torch.equal(moved.codes, packed.codes) and torch.equal(moved.scales, packed.scales)
    with pytest.raises(ValueError, match="are uint8"):
        MXFP4Tensor(packed.codes.int(), packed.scales)
    with pytest.raises(ValueError, match=r"need scales of shape \(3, 5, 2\), got \(3, 5, 1\)"):
        MXFP4Tensor(packed.codes, packed.scales[..., :1])
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        packed.dequantize(torch.float16)

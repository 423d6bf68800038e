"""Number formats for ablations against tables of their values, exact arithmetic, torch's casts and other libraries."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, get_args

import hypothesis.extra.numpy as hypothesis_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from speedstack.quant import mxfp4
from speedstack.quant.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    FORMATS,
    FloatElement,
    FormatName,
    fake_quantize,
    number_format,
)
from speedstack.quant.fp8 import quantize_fp8
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule

NAMES: tuple[FormatName, ...] = get_args(FormatName)
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
MX: dict[FormatName, FloatElement] = {
    "mxfp4": E2M1,
    "mxfp6_e2m3": E2M3,
    "mxfp6_e3m2": E3M2,
    "mxfp8_e4m3": E4M3,
}
RANDOM = torch.Generator().manual_seed(0)


def magnitudes(exponent_bits: int, mantissa_bits: int, without_nan: int = 0) -> list[Fraction]:
    """All magnitudes in the order of their codes: OCP v1.0, 5.3, with IEEE bias; the last `without_nan` are NaN."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = Fraction(mantissa, 2**mantissa_bits) + (exponent > 0)
            values.append(fraction * Fraction(2) ** (max(exponent, 1) - bias))
    return values[: len(values) - without_nan]


TABLES = {
    E2M1: magnitudes(2, 1),
    E2M3: magnitudes(2, 3),
    E3M2: magnitudes(3, 2),
    E4M3: magnitudes(4, 3, without_nan=1),
}


def nearest(value: float, table: Sequence[Fraction], scale: Fraction = Fraction(1)) -> float:
    """The nearest magnitude times the scale, ties to the even code, with the sign of `value`; exact in float64."""
    magnitude = abs(Fraction(value)) / scale
    above = min(bisect_left(table, magnitude), len(table) - 1)
    code = min((max(above - 1, 0), above), key=lambda index: (abs(magnitude - table[index]), index % 2))
    return math.copysign(float(table[code] * scale), value)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_tables_are_those_of_the_specification() -> None:
    assert [float(max(table)) for table in TABLES.values()] == [6.0, 7.5, 28.0, 448.0]
    assert [float(min(v for v in table if v)) for table in TABLES.values()] == [0.5, 2**-3, 2**-4, 2**-9]
    for element, table in TABLES.items():
        assert element.max_value == max(table) and 2**element.max_exponent <= element.max_value
        assert element.max_value < 2 ** (element.max_exponent + 1)


@pytest.mark.parametrize("element", TABLES)
def test_elements_are_rounded_to_the_nearest(element: FloatElement) -> None:
    """Every value, every midpoint and their neighbours in float32, both signs, and values beyond the largest."""
    table = TABLES[element]
    points = [float(v) for v in table] + [float(a + b) / 2 for a, b in pairwise(table)]
    points += [float(table[-1]) * factor for factor in (1.01, 1.5, 2.0, 1e9, 1e30)] + [1e-30, 1e-40]
    y = torch.tensor(points)
    y = torch.cat([y, y.nextafter(torch.tensor(0.0)), y.nextafter(torch.tensor(torch.inf))])
    y = torch.cat([y, -y, torch.tensor([torch.inf, -torch.inf])])
    expected = torch.tensor([nearest(min(max(v, -1e38), 1e38), table) for v in y.tolist()])
    assert torch.equal(bits(element.round(y)), bits(expected))
    assert element.round(torch.tensor([torch.nan])).isnan().all()


def test_e4m3_is_what_torch_casts_to() -> None:
    y = torch.randn(100_000, generator=RANDOM) * torch.exp2(torch.randint(-12, 9, (100_000,), generator=RANDOM))
    y = y.clamp(-448, 448)
    assert torch.equal(bits(E4M3.round(y)), bits(y.to(torch.float8_e4m3fn).float()))


def slow_mx(block: list[float], element: FloatElement, scale_rule: ScaleRule) -> list[float]:
    """The rules as their definitions read, in exact rational arithmetic."""
    table = TABLES[element]
    amax = max(abs(Fraction(value)) for value in block)
    top_power = Fraction(2) ** element.max_exponent
    exponent = -127
    while exponent < 127 - element.max_exponent and Fraction(2) ** (exponent + 1) * top_power <= amax:
        exponent += 1
    low, high = -127, 127 - element.max_exponent
    half_step = (table[-1] - table[-2]) / 2
    scale = Fraction(2) ** exponent
    # Below the smallest scale there is nothing to choose.
    if amax >= scale * top_power:
        exponent += scale_rule == "rceil" and amax > table[-1] * scale
        exponent += scale_rule == "even" and amax >= (table[-1] + half_step) * scale
    exponent = min(exponent, high)
    candidates = [exponent]
    if scale_rule == "mse":
        candidates += [min(exponent + 1, high), max(exponent - 1, low)]

    def rounded(candidate: int) -> list[float]:
        return [nearest(value, table, Fraction(2) ** candidate) for value in block]

    def error(candidate: int) -> Fraction:
        pairs = zip(rounded(candidate), block, strict=True)
        return sum(((Fraction(new) - Fraction(old)) ** 2 for new, old in pairs), Fraction(0))

    return rounded(min(candidates, key=error) if len(candidates) > 1 else exponent)


blocks = st.tuples(
    hypothesis_numpy.arrays(np.float32, 32, elements=st.floats(-8, 8, width=32)), st.integers(-146, 120)
).map(lambda pair: np.ldexp(pair[0], pair[1]).astype(np.float32))


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("name", MX)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(block=blocks)
def test_mx_formats_equal_exact_arithmetic(name: FormatName, scale_rule: ScaleRule, block: np.ndarray) -> None:
    w = torch.from_numpy(block.copy())
    expected = torch.tensor(slow_mx(w.tolist(), MX[name], scale_rule), dtype=torch.float64)
    assert torch.equal(bits(fake_quantize(w, name, scale_rule)), bits(expected.float()))


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_scale_thresholds(name: FormatName, scale_rule: ScaleRule) -> None:
    """Largest magnitudes on and next to every threshold a rule can have, and at the ends of float32."""
    element = MX[name]
    for exponent in (-149, -127, -118, -20, 0, 100, 126, 127):
        for mantissa in (1.0, 1.5, 1.75, 1.8125, 1.875, 1.9375, 2 - 2.0**-23):
            top = torch.tensor(mantissa, dtype=torch.float64).mul(2.0**exponent).float()
            for amax in (top, top.nextafter(torch.tensor(0.0)), top.nextafter(torch.tensor(torch.inf))):
                if amax.isfinite() and amax > 0:
                    w = torch.linspace(-1, 1, 32) * amax
                    expected = torch.tensor(slow_mx(w.tolist(), element, scale_rule), dtype=torch.float64)
                    assert torch.equal(bits(fake_quantize(w, name, scale_rule)), bits(expected.float()))


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_the_general_formula_gives_mxfp4(scale_rule: ScaleRule) -> None:
    exponents = torch.randint(-140, 120, (64, 8, 1), generator=RANDOM).float()
    w = (torch.randn(64, 8, 32, generator=RANDOM) * torch.exp2(exponents)).flatten(-2)
    expected = mxfp4.fake_quantize(w, scale_rule)
    assert torch.equal(bits(FORMATS["mxfp4"].round(w, scale_rule)), bits(expected))
    assert torch.equal(bits(fake_quantize(w, "mxfp4", scale_rule)), bits(expected))


def weights(*shape: int) -> torch.Tensor:
    """Bell-shaped, rows of different magnitude, one block of zeros, one outlier."""
    w = torch.randn(*shape, generator=RANDOM) * torch.exp2(torch.randint(-8, 3, (*shape[:-1], 1), generator=RANDOM))
    w[..., 0, :32] = 0.0
    w[..., 1, 5] = 40.0
    return w


def test_nvfp4_equals_compressed_tensors() -> None:
    from compressed_tensors.quantization import fake_quantize as their_fake_quantize
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    assert args is not None
    stack = weights(3, 64, 96)
    for w, found in zip(stack, fake_quantize(stack, "nvfp4"), strict=True):
        global_scale = generate_gparam(w.min(), w.max())
        low, high = w.unflatten(-1, (-1, 16)).aminmax(dim=-1)
        scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
        expected = their_fake_quantize(w, scale, zero_point, args, global_scale=global_scale)
        assert torch.equal(found, expected)
        assert found.unique().numel() > 100


def test_nvfp4_elements_are_nearest_under_their_scales() -> None:
    """In float64 from the definition; a value within float32's rounding of a midpoint may go either way."""
    w = weights(32, 64)
    amax = w.abs().amax()
    global_scale = torch.tensor(2688.0) / amax
    block_scale = (global_scale * (w.unflatten(-1, (-1, 16)).abs().amax(-1) / 6)).to(torch.float8_e4m3fn).double()
    scale = (block_scale / global_scale.double()).repeat_interleave(16, dim=-1)
    found = fake_quantize(w, "nvfp4").double()
    values = torch.tensor([float(v) for v in TABLES[E2M1]]).double()
    candidates = scale[..., None] * torch.cat([values, -values])
    best = (candidates - w.double()[..., None]).abs().amin(-1)
    # float32 rounds the scale, the quotient and the product, of at most twice the weight: eight half units each way.
    assert ((found - w.double()).abs() <= best + 8 * 2.0**-24 * w.double().abs().clamp(min=1e-30)).all()


@pytest.mark.parametrize(("name", "num_bits", "largest"), [("int4_g32", 4, 7), ("int2_g32", 2, 1)])
def test_integers_equal_their_formula_and_compressed_tensors(name: FormatName, num_bits: int, largest: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization import fake_quantize as their_fake_quantize

    w = weights(64, 96)
    found = fake_quantize(w, name)
    grouped = w.unflatten(-1, (-1, 32))
    scale = (grouped.abs().amax(-1) / largest).bfloat16().float()
    args = QuantizationArgs.model_validate({"num_bits": num_bits, "type": "int", "strategy": "group", "group_size": 32})
    safe = torch.where(scale == 0, 1.0, scale)
    theirs = their_fake_quantize(w, safe, torch.zeros_like(safe), args)
    # Their range has -8 and -2; a scale that bfloat16 rounded down cannot bring a magnitude of 7 scales or 1 there.
    assert torch.equal(found, theirs)
    table = [Fraction(k) for k in range(largest + 1)]
    for value, s, rounded in zip(
        w.flatten().tolist(),
        scale.repeat_interleave(32).tolist(),
        found.flatten().tolist(),
        strict=True,
    ):
        # The quotient is rounded to float32 before it is rounded to an integer: nothing here is that near a midpoint.
        assert rounded == (float(nearest(value, table, Fraction(s))) if s else 0.0)
    integers = found.unflatten(-1, (-1, 32)) / safe[..., None]
    assert integers.min() == -largest and integers.max() == largest
    assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("shape", [(128, 256), (3, 130, 200), (1, 7)])
def test_fp8_block128_block_by_block(shape: tuple[int, ...]) -> None:
    """Torch's cast under each block's own scale; blocks at the edges are smaller."""
    w = weights(*shape) if shape[-2] > 1 else torch.randn(shape, generator=RANDOM)
    found = fake_quantize(w, "fp8_block128").reshape(-1, *shape[-2:])
    for matrix, rounded in zip(w.reshape(-1, *shape[-2:]), found, strict=True):
        for row in range(0, shape[-2], 128):
            for column in range(0, shape[-1], 128):
                block = matrix[row : row + 128, column : column + 128]
                scale = block.abs().max() / 448
                expected = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(rounded[row : row + 128, column : column + 128], expected)


@pytest.mark.parametrize("scale_rule", ["floor", "rceil"])
@pytest.mark.parametrize("name", MX)
def test_mx_formats_equal_torchao(name: FormatName, scale_rule: ScaleRule) -> None:
    mx_tensor: Any = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode

    element = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp8_e4m3": torch.float8_e4m3fn,
    }[name]
    # Its smallest scale is 2**-126, ours 2**-127: blocks above that.
    w = torch.randn(64, 256, generator=RANDOM) * torch.exp2(torch.randint(-60, 60, (64, 1), generator=RANDOM))
    theirs = mx_tensor.MXTensor.to_mx(w, element, 32, ScaleCalculationMode(scale_rule))
    assert torch.equal(fake_quantize(w, name, scale_rule), theirs.dequantize(torch.float32))


def test_bits_and_blocks() -> None:
    assert {name: FORMATS[name].bits_per_weight for name in NAMES} == {
        "mxfp4": 4.25,
        "mxfp6_e2m3": 6.25,
        "mxfp6_e3m2": 6.25,
        "mxfp8_e4m3": 8.25,
        "nvfp4": 4.5,
        "int4_g32": 4.5,
        "int2_g32": 2.5,
        "fp8_block128": 8 + 32 / 128**2,
    }
    assert {FORMATS[name].block_shape for name in NAMES} == {(1, 32), (1, 16), (128, 128)}
    assert all(number_format(name).name == name for name in NAMES)


def test_more_bits_are_nearer() -> None:
    """The order of the errors on bell-shaped weights: a check that no format is mixed up with another."""
    w = torch.randn(256, 512, generator=RANDOM)
    error = {name: (fake_quantize(w, name) - w).square().mean().item() for name in NAMES}
    assert error["nvfp4"] < error["mxfp4"] and error["int4_g32"] < error["mxfp4"]
    assert error["mxfp6_e2m3"] < error["mxfp6_e3m2"] < error["nvfp4"]
    assert max(error["fp8_block128"], error["mxfp8_e4m3"]) < error["mxfp6_e3m2"]
    # What MXFP4's and INT4's own descriptions report for a normal distribution.
    assert error["mxfp4"] == pytest.approx(0.0126, rel=0.05) and error["int4_g32"] == pytest.approx(0.0101, rel=0.1)
    # Nothing up to half of a block's largest magnitude survives.
    assert error["int2_g32"] > 30 * error["int4_g32"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_properties_all_formats_share(name: FormatName, dtype: torch.dtype) -> None:
    w = weights(2, 128, 256).to(dtype)
    before = w.clone()
    found = fake_quantize(w, name)
    assert found.dtype == dtype and found.shape == w.shape and found.isfinite().all()
    assert torch.equal(w, before)
    assert torch.equal(found[..., 0, :16], torch.zeros_like(found[..., 0, :16]))
    # One matrix at a time, and other memory layouts, give the same values.
    assert torch.equal(torch.stack([fake_quantize(matrix, name) for matrix in w]), found)
    assert torch.equal(fake_quantize(w.transpose(0, 1).contiguous().transpose(0, 1), name), found)
    # bfloat16 in, or the same values in float32: rounded once at the end.
    assert torch.equal(fake_quantize(w.float(), name).to(dtype), found)
    assert fake_quantize(torch.zeros(128, 128, dtype=dtype), name).abs().max() == 0


class NoDivisionByNumbers(TorchFunctionMode):
    """On a GPU torch replaces it by a product with the reciprocal, which rounds otherwise than a CPU's division."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_division = getattr(func, "__name__", "") in ("div", "div_", "divide", "true_divide", "__truediv__")
        assert not (is_division and isinstance(args[1], int | float)), f"{func} by the number {args[1]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_devices_agree_on_every_division(name: FormatName) -> None:
    w = torch.randn(2, 128, 128, generator=RANDOM)
    with NoDivisionByNumbers():
        found = number_format(name).round(w, DEFAULT_SCALE_RULE)
        if name == "fp8_block128":
            quantize_fp8(w[0])
    assert torch.equal(bits(found), bits(fake_quantize(w, name)))
    with pytest.raises(AssertionError, match="by the number 7"), NoDivisionByNumbers():
        w / 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_computes_the_same(name: FormatName) -> None:
    w = torch.randn(3, 256, 512, generator=RANDOM) * torch.exp2(torch.randint(-9, 9, (3, 256, 1), generator=RANDOM))
    assert torch.equal(bits(fake_quantize(w.cuda(), name).cpu()), bits(fake_quantize(w, name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e-38, 3e-36, 1e36, 3.4e38])
def test_ends_of_float32(name: FormatName, value: float) -> None:
    """Errors as a part of the largest magnitude: no more than what lies above an element type's largest value where
    there is no larger scale, or half a step at the largest value where scales are no powers of two.
    """
    w = torch.linspace(-1, 1, 128).expand(128, 128) * value
    # The scale of integers is rounded to bfloat16, by up to 2^-9.
    bounds = {"nvfp4": 1 / 6, "int4_g32": 1 / 14 + 2**-9, "int2_g32": 1 / 2 + 2**-9, "fp8_block128": 1 / 28}
    bounds |= {mx: 1 - element.max_value / 2 ** (element.max_exponent + 1) for mx, element in MX.items()}
    found = fake_quantize(w, name)
    error = float((found.double() - w.double()).abs().max() / w.double().max())
    if name == "nvfp4" and value < 1:
        # The scale of its matrix overflows, so that of every block vanishes: as in compressed-tensors.
        assert not found.any()
    else:
        assert 0 < error <= bounds[name] * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_subnormal_weights_stay_or_vanish(name: FormatName) -> None:
    w = torch.linspace(-1, 1, 128).expand(128, 128) * 1e-45
    found = fake_quantize(w, name)
    assert torch.equal(found, torch.zeros_like(w)) or torch.equal(found, w)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_straight_through(name: FormatName) -> None:
    w = torch.randn(4, 64, generator=RANDOM).requires_grad_()
    upstream = torch.randn(4, 64, generator=RANDOM)
    fake_quantize(w, name).backward(upstream)
    assert w.grad is not None and torch.equal(w.grad, upstream)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_blocks_become_nan(name: FormatName, bad: float) -> None:
    w = torch.randn(2, 128, 256, generator=RANDOM)
    clean = fake_quantize(w, name)
    w[1, 3, 40] = bad
    found = fake_quantize(w, name)
    rows, columns = number_format(name).block_shape
    start = 40 // columns * columns
    block = (1, slice(None) if rows > 1 else 3, slice(start, start + columns))
    assert found[block].isnan().all()
    assert torch.equal(found[0], clean[0])
    if name == "nvfp4":
        assert found[1].isnan().all()
    else:
        found[block] = clean[block]
        assert torch.equal(found, clean)


def test_bad_arguments() -> None:
    w = torch.zeros(2, 33)
    for name in NAMES:
        if name != "fp8_block128":
            with pytest.raises(ValueError, match=r"multiple of (16|32), got shape \(2, 33\)"):
                fake_quantize(w, name)
        with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float16"):
            fake_quantize(torch.zeros(2, 32, dtype=torch.float16), name)
        if name in MX:
            with pytest.raises(ValueError, match="unknown scale rule 'ceil': choose one of floor, rceil, even, mse"):
                fake_quantize(torch.zeros(2, 32), name, "ceil")  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match=f"{name} has no scale rule, got 'even'"):
                fake_quantize(torch.zeros(2, 32), name, "even")
    with pytest.raises(ValueError, match=r"fp8_block128 needs matrices, got shape \(256,\)"):
        fake_quantize(torch.zeros(256), "fp8_block128")
    with pytest.raises(ValueError, match="unknown number format 'fp3': choose one of mxfp4, mxfp6_e2m3"):
        fake_quantize(w, "fp3")  # type: ignore[arg-type]


def test_bytes_of_stored_weights() -> None:
    packed = mxfp4.quantize(torch.zeros(3, 5, 64))
    assert number_format("mxfp4").num_bytes((3, 5, 64)) == packed.nbytes
    for name in NAMES:
        chosen = number_format(name)
        matrix_scale = 4 if name == "nvfp4" else 0
        assert chosen.num_bytes((2, 128, 256)) == 2 * (128 * 256 * chosen.bits_per_weight / 8 + matrix_scale)
    # Blocks at the edges have whole scales.
    assert number_format("fp8_block128").num_bytes((129, 130)) == 129 * 130 + 4 * 4

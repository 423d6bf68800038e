"""FP8 in tiles: the format's corners, and transformers' own reading and writing of it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from speedstack.quant.fp8 import FP8Tensor, joined, quantize_fp8

SCALE_DTYPES = [torch.float32, torch.float8_e8m0fnu]


def matrix(*shape: int) -> torch.Tensor:
    """Values over many binades, so that tiles differ in scale."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-20, 20, shape, generator=generator))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_transformers_dequantizes_the_same_values(scale_dtype: torch.dtype) -> None:
    tensor = quantize_fp8(matrix(256, 384), scale_dtype)
    quantizer = cast(Any, SimpleNamespace())
    for dtype in (torch.float32, torch.bfloat16):
        theirs = Fp8Dequantize(quantizer)._dequantize_one(tensor.codes_OI, tensor.scales_PQ, dtype)
        assert torch.equal(tensor.dequantize(dtype), theirs)


def test_e8m0_scales_are_those_of_transformers() -> None:
    """Away from exact powers of two, where its log2 may be off; float32 scales differ in how they are divided."""
    w_OI = matrix(256, 256)
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0")
    theirs = Fp8Quantize(cast(Any, SimpleNamespace(quantization_config=config)))._quantize_one("x.weight", w_OI)
    ours = quantize_fp8(w_OI, torch.float8_e8m0fnu)
    assert torch.equal(ours.scales_PQ.view(torch.uint8), theirs["x.weight_scale_inv"].view(torch.uint8))
    assert torch.equal(ours.codes_OI.view(torch.uint8), theirs["x.weight"].view(torch.uint8))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 300), (257, 64)])
def test_error_is_at_most_half_a_step(shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    """Partial tiles too. E4M3 has 3 mantissa bits: half a step is 2^-4 of a normal element, 2^-10 of a subnormal."""
    w_OI = matrix(*shape)
    tensor = quantize_fp8(w_OI, scale_dtype)
    scales_OI = tensor.scales_PQ.float().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    bound = torch.maximum(w_OI.abs() * 2**-4, scales_OI * 2**-10)
    assert ((tensor.dequantize() - w_OI).abs() <= bound * (1 + 1e-6)).all()  # the scaling itself rounds in float32


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_nothing_is_clipped_and_zeros_stay(scale_dtype: torch.dtype) -> None:
    w_OI = torch.zeros(128, 256)
    w_OI[3, 7] = -448.0 * 2**-30
    tensor = quantize_fp8(w_OI, scale_dtype)
    assert torch.equal(tensor.dequantize(), w_OI)
    assert tensor.scales_PQ.float().tolist() == [[2.0**-30, 1.0]]
    w_OI[3, 7] = 449.0
    assert quantize_fp8(w_OI, torch.float8_e8m0fnu).scales_PQ.float()[0, 0] == 2.0


def test_scales_change_dtype_only_where_that_is_exact() -> None:
    powers = quantize_fp8(matrix(128, 128), torch.float8_e8m0fnu)
    as_float = powers.with_scales(torch.float32)
    assert as_float is not None and torch.equal(as_float.dequantize(), powers.dequantize())
    back = as_float.with_scales(torch.float8_e8m0fnu)
    assert back is not None and torch.equal(back.scales_PQ.view(torch.uint8), powers.scales_PQ.view(torch.uint8))
    assert quantize_fp8(matrix(128, 128)).with_scales(torch.float8_e8m0fnu) is None


@pytest.mark.parametrize(("rows", "tile_rows"), [((256, 128, 7), 128), ((200, 24), 8), ((1, 2000), 1), ((130,), 128)])
def test_joined_rows_keep_their_values(rows: tuple[int, ...], tile_rows: int) -> None:
    """Tiles have as many rows as divide where parts begin; the last part may end anywhere."""
    parts = [quantize_fp8(matrix(size, 300)) for size in rows]
    together = joined(parts)
    assert together.tile_rows == tile_rows and together.shape == (sum(rows), 300)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(together.dequantize(dtype), torch.cat([part.dequantize(dtype) for part in parts]))
    finer = together.with_tile_rows(1)
    assert torch.equal(finer.dequantize(), together.dequantize())
    assert finer.nbytes - finer.codes_OI.nbytes == sum(rows) * 3 * 4 and finer.to("cpu").nbytes == finer.nbytes


def test_what_is_no_number_is_found() -> None:
    tensor = quantize_fp8(matrix(130, 128))
    assert not tensor.has_nan()
    for bits in (0x7F, 0xFF):
        codes_OI = tensor.codes_OI.view(torch.uint8).clone()
        codes_OI[129, 5] = bits
        assert FP8Tensor(codes_OI.view(torch.float8_e4m3fn), tensor.scales_PQ).has_nan()
    for value in (torch.nan, torch.inf):
        assert FP8Tensor(tensor.codes_OI, torch.tensor([[1.0], [value]])).has_nan()
    powers = torch.tensor([[127], [255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert FP8Tensor(tensor.codes_OI, powers).has_nan()


def test_bad_input() -> None:
    codes_OI = torch.zeros(130, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"need scales of shape \(2, 1\), got \(1, 1\)"):
        FP8Tensor(codes_OI, torch.ones(1, 1))
    with pytest.raises(ValueError, match="FP8 tiles are"):
        FP8Tensor(codes_OI, torch.ones(2, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="have 128 rows or a part of that, not 48"):
        FP8Tensor(codes_OI, torch.ones(3, 1), 48)
    for bad in (torch.zeros(2, 2, dtype=torch.float16), torch.zeros(2)):
        with pytest.raises(ValueError, match="hold float32 or bfloat16 matrices"):
            quantize_fp8(bad)
    with pytest.raises(ValueError, match="cannot quantize NaN or infinity to FP8"):
        quantize_fp8(torch.tensor([[1.0, torch.inf]]))

"""FP8 linear layers as in MiMo and DeepSeek: E4M3 elements with one scale per 128 x 128 tile.

Our recipe quantizes routed experts only, but these families' checkpoints store other linear layers so. Scales are
multipliers, float32 (MiMo, DeepSeek-V3) or E8M0 (DeepSeek-V4).

Left out: activations, per-tensor and per-channel scales, and products of FP8 with FP8.

Shape suffixes: O = out features, I = in features, P = ceil(O / rows of a tile), Q = ceil(I / 128).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE_SIZE = 128
ELEMENT_DTYPE = torch.float8_e4m3fn
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu)
# In quantization_config: whether the LM head is FP8 too, which only we write. GPTQ's configs have the same field.
HEAD_FIELD = "lm_head"
_MAX = 448.0
_NAN_BITS = 0x7F  # of an element, sign aside
# Rows converted to float32 at a time.
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, eq=False)
class FP8Tensor:
    """A matrix of shape [O, I]. Raises ValueError for inconsistent dtypes or shapes.

    codes_OI: float8_e4m3fn. scales_PQ: float32 or float8_e8m0fnu per tile; edge tiles may be partial.
    tile_rows: 128 in checkpoints; a divisor of it for joined matrices, see `joined`.
    """

    codes_OI: torch.Tensor
    scales_PQ: torch.Tensor
    tile_rows: int = TILE_SIZE

    def __post_init__(self) -> None:
        if self.codes_OI.dtype != ELEMENT_DTYPE or self.scales_PQ.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"FP8 tiles are {ELEMENT_DTYPE} with scales of {SCALE_DTYPES[0]} or {SCALE_DTYPES[1]}, got "
                f"{self.codes_OI.dtype} and {self.scales_PQ.dtype}"
            )
        if self.tile_rows < 1 or TILE_SIZE % self.tile_rows:
            raise ValueError(f"FP8 tiles have {TILE_SIZE} rows or a part of that, not {self.tile_rows}")
        sizes = (self.tile_rows, TILE_SIZE)
        expected = tuple(-(-size // tile) for size, tile in zip(self.codes_OI.shape, sizes, strict=False))
        if self.codes_OI.ndim != 2 or tuple(self.scales_PQ.shape) != expected:
            raise ValueError(
                f"FP8 codes {tuple(self.codes_OI.shape)} need scales of shape {expected}, "
                f"got {tuple(self.scales_PQ.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix that `dequantize` returns."""
        return self.codes_OI.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes_OI.nbytes + self.scales_PQ.nbytes

    def to(self, device: torch.device | str) -> "FP8Tensor":
        """The same bytes on `device`."""
        return FP8Tensor(self.codes_OI.to(device), self.scales_PQ.to(device), self.tile_rows)

    def has_nan(self) -> bool:
        """Whether an element or scale is NaN, or a scale is infinite."""
        has_nan_codes = bool(((self.codes_OI.view(torch.uint8) & _NAN_BITS) == _NAN_BITS).any())
        return has_nan_codes or not bool(torch.isfinite(self.scales_PQ.float()).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [O, I], multiplied in float32 and rounded once to `dtype`."""
        w_OI = torch.empty(self.shape, dtype=dtype, device=self.codes_OI.device)
        for start in range(0, self.shape[0], _ROWS_AT_A_TIME):
            codes_RI = self.codes_OI[start : start + _ROWS_AT_A_TIME]
            tiles = slice(start // self.tile_rows, (start + _ROWS_AT_A_TIME) // self.tile_rows)
            scales_RQ = self.scales_PQ[tiles].float().repeat_interleave(self.tile_rows, 0)[: len(codes_RI)]
            scales_RI = scales_RQ.repeat_interleave(TILE_SIZE, 1)[:, : self.shape[1]]
            w_OI[start : start + len(codes_RI)] = (codes_RI.float() * scales_RI).to(dtype)
        return w_OI

    def with_tile_rows(self, tile_rows: int) -> "FP8Tensor":
        """The same values with tiles of fewer rows, a divisor of `tile_rows`."""
        assert self.tile_rows % tile_rows == 0
        num_tiles = -(-self.shape[0] // tile_rows)
        scales_PQ = self.scales_PQ.repeat_interleave(self.tile_rows // tile_rows, 0)[:num_tiles]
        return FP8Tensor(self.codes_OI, scales_PQ, tile_rows)

    def with_scales(self, dtype: torch.dtype) -> "FP8Tensor | None":
        """The same values with scales of `dtype`; None if it cannot hold them exactly."""
        scales_PQ = self.scales_PQ.float().to(dtype)
        if not torch.equal(scales_PQ.float(), self.scales_PQ.float()):
            return None
        return FP8Tensor(self.codes_OI, scales_PQ, self.tile_rows)


def joined(parts: Sequence[FP8Tensor]) -> FP8Tensor:
    """The rows of several matrices with float32 scales.

    Tiles restart with every part, so their rows divide all parts' starts: 128 for most models.
    """
    assert all(part.scales_PQ.dtype == torch.float32 for part in parts)
    tile_rows = math.gcd(*(part.tile_rows for part in parts), *(part.shape[0] for part in parts[:-1]))
    codes_OI = torch.cat([part.codes_OI.view(torch.uint8) for part in parts]).view(ELEMENT_DTYPE)
    return FP8Tensor(codes_OI, torch.cat([part.with_tile_rows(tile_rows).scales_PQ for part in parts]), tile_rows)


def quantize_fp8(w_OI: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> FP8Tensor:
    """Rounds a float32 or bfloat16 matrix to E4M3 with scale = largest magnitude / 448 per tile.

    E8M0 scales round up, so nothing clips. A zero tile has scale 1. Elements round to nearest, ties to even. Raises
    ValueError for other dtypes and shapes, NaN and infinity.
    """
    if w_OI.ndim != 2 or w_OI.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"FP8 tiles hold float32 or bfloat16 matrices, got {w_OI.dtype} {tuple(w_OI.shape)}")
    O, I = w_OI.shape  # noqa: E741
    codes_OI = torch.empty((O, I), dtype=ELEMENT_DTYPE)
    rows_of_scales = []
    for start in range(0, O, TILE_SIZE):
        rows_RI = w_OI[start : start + TILE_SIZE].float()
        amax_Q = torch.stack([tile.abs().amax() for tile in rows_RI.split(TILE_SIZE, dim=1)])
        if not torch.isfinite(amax_Q).all():
            raise ValueError("cannot quantize NaN or infinity to FP8: check the weights")
        scales_Q = scales_of(amax_Q)
        if scale_dtype == torch.float8_e8m0fnu:
            scales_Q = _next_power_of_two(scales_Q)
        rows_of_scales.append(scales_Q)
        scales_I = scales_Q.repeat_interleave(TILE_SIZE)[:I]
        codes_OI[start : start + TILE_SIZE] = (rows_RI / scales_I).clamp_(-_MAX, _MAX).to(ELEMENT_DTYPE)
    return FP8Tensor(codes_OI, torch.stack(rows_of_scales).to(scale_dtype))


def scales_of(amax: torch.Tensor) -> torch.Tensor:
    """The scale that maps each largest magnitude to 448; 1 if the quotient is 0."""
    scales = quotient(amax, _MAX)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def quotient(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor, correctly rounded on every device: a GPU multiplies by the reciprocal of a Python number."""
    return x / torch.full_like(x, divisor)


def _next_power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The smallest normal power of two >= each positive float32, from its bits: `log2` may be off by one."""
    bits = (scales.view(torch.int32) + 0x007FFFFF) & 0x7F800000
    return bits.clamp_(min=0x00800000).view(torch.float32)

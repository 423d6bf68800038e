"""Panels hold the bits of the matrices that they were made of, where kernels/weights.h says, on every instruction set.

Legend: M matrices of a stack, N outputs, K inputs, P panels, C chunks of 64 bytes, G blocks of 32 inputs.
"""

import numpy as np
import pytest
import torch

from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.cpu.kernels.build import VARIABLE, available_sets
from speedstack.runtime.backends.cpu.packed_layout import (
    BFLOAT16,
    FLOAT32,
    FP8,
    INT8,
    MXFP4_BYTES,
    MXFP4_WORDS,
    Panels,
    int8_blocks,
    panels,
    unpacked,
)
from speedstack.runtime.backends.cpu.program import LINEAR, Program, Runner, records_of

SHAPES = [(1, 16, 32), (2, 48, 96), (1, 33, 160), (3, 16, 384), (2, 8, 128), (1, 80, 2880)]


def bytes_of(matrix: Panels) -> np.ndarray:
    """[M, P, C, 64], whatever was stacked."""
    data = matrix.data.view(torch.int32).numpy()
    return data.reshape(-1, *data.shape[-3:]).view(np.uint8)


def where(num_outputs: int, num_panels: int, is_gate_up: bool) -> tuple[np.ndarray, np.ndarray]:
    """Panel and lane of each output."""
    n = np.arange(num_outputs)
    panel, half = n // 16, num_panels // 2
    if is_gate_up:
        panel = np.where(panel < half, 2 * panel, 2 * (panel - half) + 1)
    return panel[:, None], n[:, None] % 16


def codes_and_scales(
    matrix: Panels, num_outputs: int, num_inputs: int, is_gate_up: bool = False
) -> tuple[np.ndarray, ...]:
    """Codes [M, N, K] and scales [M, N, G], looked up one by one."""
    b = bytes_of(matrix)
    panel, lane = where(num_outputs, b.shape[1], is_gate_up)
    k, block = np.arange(num_inputs)[None], np.arange(num_inputs // 32)[None]
    if matrix.format in (INT8, FP8):
        codes = b[:, panel, k // 4 + k // 64 + 1, k % 4 * 16 + lane]
        if matrix.format == FP8:
            return codes, b.view(np.float32)[:, panel, block // 2 * 17, lane]
        return codes.view(np.int8), b.view(np.uint16)[:, panel, block // 2 * 17, 2 * lane + block % 2]
    chunk = k // 8 + k // 128 + 1
    if matrix.format == MXFP4_WORDS:
        codes = b[:, panel, chunk, 4 * lane + k % 8 // 2] >> 4 * (k % 2) & 15
    else:
        assert matrix.format == MXFP4_BYTES
        at = 16 * (lane // 4) + 2 * (lane % 4) + (k & 1) + 8 * (k % 4 // 2)
        codes = b[:, panel, chunk, at] >> 4 * (k % 8 // 4) & 15
    return codes, b[:, panel, block // 4 * 17, 4 * lane + block % 4]


def random_mxfp4(shape: tuple[int, int, int], seed: int = 0) -> tuple[MXFP4Tensor, torch.Tensor]:
    """A stack of packed matrices with all codes and scales, and its codes one by one."""
    generator = torch.Generator().manual_seed(seed)
    codes_MNK = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    scales_MNG = torch.randint(0, 256, (*shape[:2], shape[2] // 32), dtype=torch.uint8, generator=generator)
    return MXFP4Tensor(codes_MNK[..., ::2] | codes_MNK[..., 1::2] << 4, scales_MNG), codes_MNK


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_mxfp4(shape: tuple[int, int, int], num_threads: int, loaded_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    weight, codes_MNK = random_mxfp4(shape)
    matrix = panels(weight)
    assert matrix.format == (MXFP4_WORDS if loaded_set == "avx512" else MXFP4_BYTES)
    num_outputs, num_blocks = -(-shape[1] // 16) * 16, shape[2] // 32
    codes, scales = codes_and_scales(matrix, num_outputs, shape[2])
    assert np.array_equal(codes[:, : shape[1]], codes_MNK.numpy())
    assert np.array_equal(scales[:, : shape[1]], weight.scales.numpy())
    # What is no output's, and no block's, is zero: it is multiplied too, or never written.
    assert not codes[:, shape[1] :].any() and not scales[:, shape[1] :].any()
    groups = bytes_of(matrix)[:, :, ::17].reshape(shape[0], num_outputs // 16, -1, 16, 4)
    assert not groups[:, :, -1, :, (num_blocks - 1) % 4 + 1 :].any()


def test_gates_and_ups_alternate(loaded_set: str) -> None:
    weight, codes_MNK = random_mxfp4((3, 96, 160))
    codes, scales = codes_and_scales(panels(weight, is_gate_up=True), 96, 160, is_gate_up=True)
    assert np.array_equal(codes, codes_MNK.numpy()) and np.array_equal(scales, weight.scales.numpy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_gate_up", [False, True], ids=["rows", "gates and ups"])
def test_eight_bits(shape: tuple[int, int, int], is_gate_up: bool, loaded_set: str) -> None:
    if is_gate_up and shape[1] % 32:
        shape = (shape[0], 64, shape[2])
    w_MNK = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected_MNK, expected_MNG = int8_blocks(w_MNK)
    codes, scales = codes_and_scales(panels(w_MNK, is_gate_up, to_int8=True), *shape[1:], is_gate_up)
    assert np.array_equal(codes, expected_MNK.numpy())
    assert np.array_equal(scales, expected_MNG.view(torch.uint16).numpy())


@pytest.mark.parametrize("shape", [(32, 64), (160, 96), (384, 320)])
@pytest.mark.parametrize("is_gate_up", [False, True], ids=["rows", "gates and ups"])
@pytest.mark.parametrize("tile_rows", [128, 32])
def test_fp8(shape: tuple[int, int], is_gate_up: bool, tile_rows: int, loaded_set: str) -> None:
    generator = torch.Generator().manual_seed(4)
    num_tiles = -(-shape[0] // tile_rows), -(-shape[1] // 128)
    scales_PQ = torch.rand(num_tiles, generator=generator)
    weight = FP8Tensor(torch.randn(shape, generator=generator).to(torch.float8_e4m3fn), scales_PQ, tile_rows)
    codes, scales = codes_and_scales(panels(weight, is_gate_up), *shape, is_gate_up)
    assert np.array_equal(codes[0], weight.codes_OI.view(torch.uint8).numpy())
    n, block = np.arange(shape[0])[:, None], np.arange(shape[1] // 32)[None]
    assert np.array_equal(scales[0], scales_PQ.numpy()[n // tile_rows, block // 4])


@pytest.mark.parametrize("shape", [*SHAPES, (2, 20, 33), (1, 16, 4)])
@pytest.mark.parametrize("is_gate_up", [False, True], ids=["rows", "gates and ups"])
def test_plain_values(shape: tuple[int, int, int], is_gate_up: bool, loaded_set: str) -> None:
    if is_gate_up and shape[1] % 32:
        shape = (shape[0], 64, shape[2])
    w_MNK = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    matrix = panels(w_MNK, is_gate_up)
    words = bytes_of(matrix).view(np.uint32)
    panel, lane = where(shape[1], words.shape[1], is_gate_up)
    k = np.arange(shape[2])[None]
    assert matrix.format == FLOAT32
    assert np.array_equal(words[:, panel, k, lane], w_MNK.view(torch.uint32).numpy())
    if shape[2] % 2:
        return
    half_MNK = w_MNK.bfloat16()
    for held in (half_MNK, half_MNK.float()):
        matrix = panels(held, is_gate_up)
        assert matrix.format == BFLOAT16
        words = bytes_of(matrix).view(np.uint32)
        assert np.array_equal(
            words[:, panel, k // 2, lane] >> 16 * (k % 2) & 0xFFFF, half_MNK.view(torch.uint16).numpy()
        )
    if not is_gate_up:
        assert torch.equal(unpacked(panels(half_MNK[0]), shape[1]), half_MNK[0].float())
        assert torch.equal(unpacked(panels(w_MNK[0]), shape[1]), w_MNK[0])


def test_what_is_not_contiguous_is_packed_as_it_reads(loaded_set: str) -> None:
    w_KN = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(panels(w_KN.T).data, panels(w_KN.T.contiguous()).data)
    weight, _ = random_mxfp4((4, 32, 128))
    every_other = MXFP4Tensor(weight.codes[::2], weight.scales[::2])
    copied = MXFP4Tensor(every_other.codes.clone(), every_other.scales.clone())
    assert torch.equal(panels(every_other).data, panels(copied).data)


def test_kernels_run_nothing_that_was_packed_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = available_sets()
    if len({name == "avx512" for name in sets}) == 1:
        pytest.skip("this machine has kernels of one layout only")
    weight, _ = random_mxfp4((1, 32, 64))
    x, y = torch.randn(64, 64), torch.zeros(64, 32)
    programs = {}
    for name in ("avx512", "avx2"):
        monkeypatch.setenv(VARIABLE, name)
        programs[name] = Program()
        programs[name].add(LINEAR, [64, 32, 0, 0], (), [x, panels(MXFP4Tensor(weight.codes[0], weight.scales[0])), y])
    for name, other in (("avx512", "avx2"), ("avx2", "avx512")):
        monkeypatch.setenv(VARIABLE, name)
        runner = Runner()
        monkeypatch.setenv(VARIABLE, other)  # those that were loaded stay with the runner
        runner.run(records_of(programs[name]), [0], [0], [0], [0], [], 1)
        with pytest.raises(AssertionError, match="packed for the kernels of another instruction set"):
            runner.run(records_of(programs[other]), [0], [0], [0], [0], [], 1)

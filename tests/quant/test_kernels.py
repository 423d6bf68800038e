"""The compiled kernels against the PyTorch reference, bit for bit: C++ on a CPU, Triton on a GPU or interpreted."""

import platform
import re
from collections.abc import Iterator
from typing import Any, get_args

import hypothesis.extra.numpy as hypothesis_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedstack.quant.kernels import Kernels, kernels_for, mxfp4_cpu
from speedstack.quant.mxfp4 import (
    BLOCK_SIZE,
    MXFP4Tensor,
    ScaleRule,
    dequantize,
    dequantize_reference,
    fake_quantize,
    fake_quantize_reference,
    quantize,
    quantize_reference,
)
from tests.devices import DEVICES, INTERPRETS, not_interpreted

SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
DTYPES = [torch.float32, torch.bfloat16]


# The source has vectors of 16, 8 or 4 lanes, by what is compiled for.
NARROWER = {"c++, 8 lanes": "x86-64-v3", "c++, 4 lanes": "x86-64-v2"} if platform.machine() == "x86_64" else {}
KERNELS = ["c++", *NARROWER, *DEVICES]


@pytest.fixture(params=KERNELS, scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param.startswith("c++"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if request.param in NARROWER:
                if "x86-64-v3" in NARROWER[request.param] and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
                    pytest.skip("this CPU has no AVX2")
                flags = [flag.replace("native", NARROWER[request.param]) for flag in mxfp4_cpu.FLAGS]
                monkeypatch.setattr(mxfp4_cpu, "FLAGS", flags)
            mxfp4_cpu.load_kernels.cache_clear()
            assert mxfp4_cpu.load_kernels() is not None, "the tests need a C++ compiler, as the README says"
            yield mxfp4_cpu
        mxfp4_cpu.load_kernels.cache_clear()
        return
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
    from speedstack.quant.kernels import mxfp4_triton

    yield mxfp4_triton


def device_of(kernels: Kernels) -> str:
    return "cpu" if kernels is mxfp4_cpu or INTERPRETS else "cuda"


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, signed zeros included; of NaN only that it is one, because PyTorch's own payloads vary."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = found.cpu(), expected.cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    known = ~expected.isnan()
    assert torch.equal(found.view(integer)[known], expected.view(integer)[known])


def check(kernels: Kernels, w_NK: torch.Tensor, scale_rule: ScaleRule) -> None:
    """All three functions against the reference, for a tensor that may hold NaN and infinity."""
    on_device = w_NK.to(device_of(kernels))
    assert_same_bits(kernels.fake_quantize(on_device, scale_rule), fake_quantize_reference(w_NK, scale_rule))
    codes_NH, scales_NG = (part.cpu() for part in kernels.quantize(on_device, scale_rule))
    is_finite = w_NK.unflatten(-1, (-1, BLOCK_SIZE)).isfinite().all(-1)
    assert torch.equal(scales_NG == 255, ~is_finite)
    expected = quantize_reference(torch.where(w_NK.isfinite(), w_NK, 0.0), scale_rule)
    assert torch.equal(scales_NG[is_finite], expected.scales[is_finite])
    blocks = codes_NH.unflatten(-1, (-1, BLOCK_SIZE // 2))
    assert torch.equal(blocks[is_finite], expected.codes.unflatten(-1, (-1, BLOCK_SIZE // 2))[is_finite])
    for dtype in DTYPES:
        values = kernels.dequantize(codes_NH.to(device_of(kernels)), scales_NG.to(device_of(kernels)), dtype)
        assert_same_bits(values, dequantize_reference(MXFP4Tensor(codes_NH, scales_NG), dtype))


def edge_cases() -> torch.Tensor:
    """[blocks, 32]: around every midpoint and every scale threshold, at every exponent of float32."""
    points = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 6.5, 7, 7.5, 8.0]).double()
    ulp = 2.0**-22
    around = torch.cat([points, points * (1 - ulp), points * (1 + ulp), torch.zeros(1), points[:1] * 1e-30])
    around = torch.cat([around, -around])
    mantissas = torch.tensor([1.0, 1.5, 1.75, 2 - 2.0**-23, 1.5 - 2.0**-23, 1.5 + 2.0**-23, 1.75 - 2.0**-23])
    rows = []
    for index in range(0, len(around), BLOCK_SIZE - 1):
        chunk = around[index : index + BLOCK_SIZE - 1]
        rows.append(torch.cat([chunk, torch.zeros(BLOCK_SIZE - 1 - len(chunk))]))
    block = torch.stack(rows)
    # Each mantissa times four is a block's largest magnitude; what would top it is left out.
    tops = (4 * mantissas.double())[:, None, None].expand(-1, len(rows), 1)
    rest = block.expand(len(mantissas), -1, -1)
    blocks = torch.cat([tops, rest.where(rest.abs() <= tops, 0.0)], dim=-1).flatten(0, 1)
    # Exact at more than one scale, so that the errors of `mse` tie.
    ties = torch.stack([torch.full((BLOCK_SIZE,), value) for value in (0.0, -0.0, 1.0, 4.0, 6.0)]).double()
    blocks = torch.cat([blocks, torch.nn.functional.pad(block, (0, 1)), ties])
    exponents = torch.arange(-152, 126).double()[:, None, None]
    w = (blocks * torch.exp2(exponents)).float().flatten(0, 1)
    return w[w.isfinite().all(-1)]


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_cases_equal_the_reference(
    kernels: Kernels, scale_rule: ScaleRule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETS:
        from speedstack.quant.kernels import mxfp4_triton

        # The interpreter takes as long for a program of many blocks as for one of few.
        monkeypatch.setattr(mxfp4_triton, "BLOCKS_PER_PROGRAM", 4096)
    check(kernels, edge_cases().to(dtype).flatten().unsqueeze(0), scale_rule)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_tensors_equal_the_reference(kernels: Kernels, scale_rule: ScaleRule, dtype: torch.dtype) -> None:
    """Every exponent, mixed blocks, NaN and infinities; a number of blocks that fills no whole program or thread."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-150, 125, (3, 67, 1), generator=generator).float()
    w = (torch.randn(3, 67, 96, generator=generator) * torch.exp2(exponents)).to(dtype)
    for index, bad in enumerate((float("nan"), float("inf"), -float("inf"), -float("nan"))):
        w[1, 10 * index, 33 + index] = bad
    check(kernels, w, scale_rule)


# Any bits at all, and blocks of values that are close to each other.
any_blocks = st.one_of(
    hypothesis_numpy.arrays(np.uint32, (4, BLOCK_SIZE), elements=st.integers(0, 2**32 - 1)).map(
        lambda bits: bits.view(np.float32)
    ),
    st.tuples(
        hypothesis_numpy.arrays(np.float32, (4, BLOCK_SIZE), elements=st.floats(-8, 8, width=32)),
        hypothesis_numpy.arrays(np.int32, (4, 1), elements=st.integers(-150, 125)),
    ).map(lambda pair: np.ldexp(*pair).astype(np.float32)),
)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_block_equals_the_reference(kernels: Kernels, scale_rule: ScaleRule, dtype: torch.dtype) -> None:
    @settings(max_examples=8 if INTERPRETS else 100, deadline=None, derandomize=True)
    @given(blocks=any_blocks)
    def run(blocks: np.ndarray) -> None:
        check(kernels, torch.from_numpy(blocks.copy()).to(dtype), scale_rule)

    run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_under_all_scales(kernels: Kernels, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 16, 1).contiguous()
    values = kernels.dequantize(codes.to(device_of(kernels)), scales.to(device_of(kernels)), dtype)
    assert_same_bits(values, dequantize_reference(MXFP4Tensor(codes, scales), dtype))


def test_more_than_one_thread_changes_nothing() -> None:
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(mxfp4_cpu, w, "mse")
    finally:
        torch.set_num_threads(before)


def test_public_functions_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lie of the kernels shows up in what the public functions return; elsewhere the reference works."""
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    packed = quantize(w)
    lie = torch.full((2, 64), 7.0)
    for name, answer in {
        "fake_quantize": lie,
        "dequantize": lie,
        "quantize": (torch.zeros_like(packed.codes), packed.scales),
    }.items():
        monkeypatch.setattr(mxfp4_cpu, name, lambda *args, answer=answer: answer)
    assert torch.equal(fake_quantize(w), lie) and torch.equal(dequantize(packed), lie)
    assert not quantize(w).codes.any()
    monkeypatch.setattr(mxfp4_cpu, "load_kernels", lambda: None)
    assert torch.equal(fake_quantize(w), fake_quantize_reference(w))
    assert torch.equal(quantize(w).codes, packed.codes)
    assert torch.equal(dequantize(packed), dequantize_reference(packed))


def test_kernels_are_offered_only_for_plain_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Subclass(torch.Tensor):
        pass

    plain = torch.zeros(2, 32)
    assert kernels_for(plain) is mxfp4_cpu and kernels_for(torch.nn.Parameter(plain)) is mxfp4_cpu
    assert kernels_for(plain.as_subclass(Subclass)) is None
    assert kernels_for(torch.zeros(0, 32)) is None
    assert kernels_for(plain.to("meta")) is None and kernels_for(plain, plain.to("meta")) is None
    with FakeTensorMode():
        assert fake_quantize(torch.zeros(2, 32)).shape == (2, 32)


def test_results_lie_where_the_input_does() -> None:
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    with torch.device("meta"):
        packed = quantize(w)
        assert packed.codes.device == packed.dequantize().device == fake_quantize(w).device == w.device


def test_layouts_other_than_contiguous() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(4))
    for view in (w.t(), w[:, 32:], w[::2], w[:, :64].t()):
        assert torch.equal(fake_quantize(view), fake_quantize_reference(view))
        assert torch.equal(quantize(view).codes, quantize_reference(view).codes)
    packed = quantize(w)
    part = MXFP4Tensor(packed.codes[:, 16:], packed.scales[:, 1:])
    assert torch.equal(part.dequantize(), dequantize_reference(part))


def test_torch_compile_traces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot look into compiled kernels; without a break of its graph the values are theirs all the same."""
    w_NK = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize(w_NK, "mse")

    def forbidden(*arguments: Any) -> torch.Tensor:
        raise AssertionError("a compiled kernel was called")

    monkeypatch.setattr(mxfp4_cpu, "fake_quantize", forbidden)
    compiled = torch.compile(fake_quantize, backend="eager", fullgraph=True)
    assert_same_bits(compiled(w_NK, "mse"), expected)


@not_interpreted
@pytest.mark.slow
def test_triton_compiles_for_hopper() -> None:
    """Without a GPU: wide loads and stores, no flushed subnormals, no fused multiply-add, no spilled register."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from speedstack.quant.kernels import mxfp4_triton

    variants: list[tuple[Any, tuple[str, ...], dict[str, Any]]] = []
    for word in ("*i16", "*i32"):
        for rule in SCALE_RULES:
            variants.append((mxfp4_triton.fake_quantize_kernel, (word, word), {"RULE": rule}))
            variants.append((mxfp4_triton.quantize_kernel, (word, "*u8", "*u8"), {"RULE": rule}))
        variants.append((mxfp4_triton.dequantize_kernel, ("*u8", "*u8", word), {}))
    for kernel, pointers, options in variants:
        constants = options | {"G": mxfp4_triton.BLOCKS_PER_PROGRAM}
        types = (*pointers, "i32", *("constexpr" for _ in constants))
        source = ASTSource(
            kernel,
            dict(zip(kernel.arg_names, types, strict=True)),
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
            {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
        )
        built = compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": mxfp4_triton.NUM_WARPS, "enable_fp_fusion": False},
        )
        ptx = built.asm["ptx"]
        assert ".target sm_90a" in ptx
        assert ".ftz" not in ptx and "fma." not in ptx
        # Words are read and written 16 bytes a thread; codes and scales, of which a thread has fewer, as they come.
        reads_words, writes_words = pointers[0] != "*u8", pointers[-1] != "*u8"
        for operation, is_wide in (("ld", reads_words), ("st", writes_words)):
            found = re.search(rf"\b{operation}\.global(\.\w+)*\.v4\.b32", ptx) is not None
            assert found or not is_wide, (kernel.fn.__name__, operation)
            assert re.search(rf"\b{operation}\.global\.", ptx), (kernel.fn.__name__, operation)
        assert "st.local" not in ptx

"""Contestants of the MXFP4 benchmark: ours, and other installed libraries.

Contestants take turns in random order. Bytes are the minimum an operation reads and writes.
"""

import functools
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from speedstack.eval.microbench.harness import available, in_turns
from speedstack.quant import mxfp4

Operation = Literal["quantize", "dequantize", "fake_quantize", "copy"]
COPY = "copy"
OURS = "speedstack"
REFERENCE = "speedstack, PyTorch reference"


@dataclass(frozen=True)
class Library:
    """A library's functions. `unpack` takes what `pack` returns; unless `whole`, they are called on matrices."""

    name: str
    pack: Callable[[torch.Tensor], Any]
    unpack: Callable[[Any, torch.dtype], torch.Tensor]
    fake: Callable[[torch.Tensor], torch.Tensor]
    whole: bool = False


def ours(scale_rule: mxfp4.ScaleRule) -> Library:
    """The public functions."""
    return Library(
        OURS,
        lambda w: mxfp4.quantize(w, scale_rule),
        mxfp4.dequantize,
        lambda w: mxfp4.fake_quantize(w, scale_rule),
        whole=True,
    )


def reference(scale_rule: mxfp4.ScaleRule) -> Library:
    """The definition, without kernels."""
    return Library(
        REFERENCE,
        lambda w: mxfp4.quantize_reference(w, scale_rule),
        mxfp4.dequantize_reference,
        lambda w: mxfp4.fake_quantize_reference(w, scale_rule),
    )


def compressed_tensors(scale_rule: mxfp4.ScaleRule) -> Library:
    """As llm-compressor calls it: scales from each group's extremes, then its compressor."""
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.quantization import fake_quantize as their_fake_quantize
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    args = scheme.weights

    def scales(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = w.unflatten(-1, (-1, 32)).aminmax(dim=-1)
        return calculate_qparams(low, high, args)

    def unpack(packed: Any, dtype: torch.dtype) -> torch.Tensor:
        return MXFP4PackedCompressor.decompress(packed, scheme)["weight"].to(dtype)

    return Library(
        "compressed-tensors",
        lambda w: MXFP4PackedCompressor.compress({"weight": w, "weight_scale": scales(w)[0]}, scheme),
        unpack,
        lambda w: their_fake_quantize(w, *scales(w), args),
    )


def torchao(scale_rule: mxfp4.ScaleRule) -> Library:
    """Its prototype MXTensor with the same scale rule."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    def pack(w: torch.Tensor) -> Any:
        return MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode(scale_rule))

    return Library("torchao", pack, lambda m, dtype: m.dequantize(dtype), lambda w: pack(w).dequantize(w.dtype))


def modelopt(scale_rule: mxfp4.ScaleRule) -> Library:
    """Its MXFP4 tensor, which only rounds scales up."""
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor

    def pack(w: torch.Tensor) -> Any:
        return MXFP4QTensor.quantize(w, 32)

    def unpack(packed: Any, dtype: torch.dtype) -> torch.Tensor:
        tensor, scale = packed
        return tensor.dequantize(dtype, scale=scale, block_sizes={-1: 32})

    return Library("nvidia-modelopt", pack, unpack, lambda w: unpack(pack(w), w.dtype))


PEERS: dict[str, Callable[[mxfp4.ScaleRule], Library]] = {
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
    "nvidia-modelopt": modelopt,
}


def peer_libraries(scale_rule: mxfp4.ScaleRule, w: torch.Tensor) -> tuple[list[Library], dict[str, str]]:
    """The peers that can quantize `w`; the others' reasons by name."""

    def tried(name: str) -> Library:
        library = PEERS[name](scale_rule)
        library.unpack(library.pack(w), w.dtype)
        library.fake(w)
        return library

    found, missing = available({name: functools.partial(tried, name) for name in PEERS})
    return list(found.values()), missing


@dataclass(frozen=True)
class Samples:
    """Seconds of every repeat of one contestant at one operation on `num_experts` matrices.

    num_bytes: read and written. relative_squared_error: of the first matrix; None for the copy.
    """

    operation: Operation
    contestant: str
    num_experts: int
    seconds: list[float]
    num_bytes: int
    relative_squared_error: float | None


def time_libraries(
    w: torch.Tensor, libraries: list[Library], num_repeats: int, peer_experts: int, orders: random.Random, title: str
) -> list[Samples]:
    """Every operation of every library on `w` [experts, out, in], and a copy of it.

    peer_experts: for libraries that are not `whole`. title: prefix of progress lines.
    """
    calls: dict[tuple[Operation, str], Callable[[], Any]] = {("copy", COPY): w.clone}
    errors: dict[str, float] = {}
    num_experts = {COPY: len(w)}
    for library in libraries:
        num_experts[library.name] = len(w) if library.whole else peer_experts
        if library.whole:
            parts = [w]
        elif w.device.type == "cpu":
            parts = list(w[:peer_experts])
        else:
            parts = [w[:peer_experts].flatten(0, 1)]
        packed = [library.pack(part) for part in parts]
        errors[library.name] = _relative_squared_error(library, w[0])
        calls["quantize", library.name] = functools.partial(_for_each, library.pack, parts)
        calls["dequantize", library.name] = functools.partial(_unpack_each, library, packed, w.dtype)
        calls["fake_quantize", library.name] = functools.partial(_for_each, library.fake, parts)

    def run(key: tuple[Operation, str], turn: int) -> float:
        seconds = _seconds(calls[key], w.device)
        print(f"{title} repeat {turn + 1}: {key[0]} {key[1]} {seconds:.4f} s", file=sys.stderr)
        return seconds

    seconds = in_turns(calls, run, num_repeats, num_warmups=0, orders=orders)
    weight_bytes = w[0].nbytes
    packed_bytes = w[0].numel() // 2 + w[0].numel() // mxfp4.BLOCK_SIZE
    bytes_an_expert = {"copy": 2 * weight_bytes, "fake_quantize": 2 * weight_bytes}
    return [
        Samples(
            operation=operation,
            contestant=name,
            num_experts=num_experts[name],
            seconds=values,
            num_bytes=bytes_an_expert.get(operation, weight_bytes + packed_bytes) * num_experts[name],
            relative_squared_error=errors.get(name),
        )
        for (operation, name), values in seconds.items()
    ]


def _for_each(function: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
    return [function(part) for part in parts]


def _unpack_each(library: Library, packed: list[Any], dtype: torch.dtype) -> list[torch.Tensor]:
    return [library.unpack(each, dtype) for each in packed]


def _relative_squared_error(library: Library, w: torch.Tensor) -> float:
    error = library.unpack(library.pack(w), torch.float32).double() - w.double()
    return (error.square().sum() / w.double().square().sum()).item()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call; freeing the result on a CPU is excluded."""
    if device.type == "cuda":
        return _cuda_seconds(call)
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _cuda_seconds(call: Callable[[], Any], num_calls: int = 10) -> float:
    """Mean of consecutive calls by the device's clock, because one call takes little longer than its launch."""
    call()  # compiles, and warms the allocator
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / num_calls

"""How fast MXFP4 is quantized, dequantized and fake-quantized, against other libraries in the same run.

    python -m speedstack.eval.bench_quant [--out results/x.json] [--device cuda] [--shape 128,1536,2048]

The default shape is gate and up projection of one layer of Qwen3-30B-A3B's experts. Contestants take turns in an order
drawn anew for every repeat, and medians are compared. Ours is called on the whole layer, as training does. On a CPU the
others are called expert by expert, which is how they are used (they quantize linear layers) and spares their
temporaries the way to main memory; on a GPU on all experts as one matrix, which spares them launches. With
`--peer-experts N` they get the first N experts only: their time is proportional to that, and the whole layer takes
them minutes. They may round differently: torchao has the same rule as ours, compressed-tensors its own (the same values
by default), ModelOpt rounds scales up; `relative_squared_error` shows that all do the job.

Bytes are those an operation must read and write, so a copy of the input is the yardstick for what memory allows.
"""

import argparse
import functools
import importlib.metadata
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

from speedstack.eval.environment import describe_environment
from speedstack.eval.results import Document, Environment, Record, Spread, Unavailable
from speedstack.eval.timing import PEER_ERRORS, one_line, spread
from speedstack.quant import mxfp4
from speedstack.quant.kernels import kernels_for

Operation = Literal["quantize", "dequantize", "fake_quantize", "copy"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPE = (128, 1536, 2048)
COPY = "copy"
OURS = "speedstack"
REFERENCE = "speedstack, PyTorch reference"


class QuantTiming(Record):
    """One contestant at one operation: `seconds` for `num_experts` matrices, of which it reads and writes `num_bytes`.

    `times_ours` is the ratio of median times an expert; `relative_squared_error` is the sum of squared errors of the
    first matrix over its sum of squares.
    """

    operation: Operation
    dtype: str
    contestant: str
    num_experts: int
    seconds: Spread
    num_bytes: int
    bytes_per_second: float
    fraction_of_copy: float
    times_ours: float | None
    relative_squared_error: float | None


class QuantBench(Document):
    """Everything one run measured."""

    kind: Literal["quant-bench"] = "quant-bench"
    environment: Environment
    device: str
    shape: tuple[int, ...]
    scale_rule: str
    peer_versions: dict[str, str]
    timings: tuple[QuantTiming, ...]
    unavailable: tuple[Unavailable, ...]


@dataclass(frozen=True)
class Library:
    """A way to use MXFP4. `pack` gives whatever `unpack` takes; those that are not `whole` are called on matrices."""

    name: str
    pack: Callable[[torch.Tensor], Any]
    unpack: Callable[[Any, torch.dtype], torch.Tensor]
    fake: Callable[[torch.Tensor], torch.Tensor]
    whole: bool = False


def ours(scale_rule: mxfp4.ScaleRule) -> Library:
    """The public functions, whatever kernels they find."""
    return Library(
        OURS,
        lambda w: mxfp4.quantize(w, scale_rule),
        mxfp4.dequantize,
        lambda w: mxfp4.fake_quantize(w, scale_rule),
        whole=True,
    )


def reference(scale_rule: mxfp4.ScaleRule) -> Library:
    """The definition, as it runs where there is no kernel."""
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


def available(scale_rule: mxfp4.ScaleRule, w: torch.Tensor) -> tuple[list[Library], list[Unavailable]]:
    """The peers that are installed and can quantize `w`; the others with their reasons."""
    found, missing = [], []
    for name, make in PEERS.items():
        try:
            library = make(scale_rule)
            library.unpack(library.pack(w), w.dtype)
            library.fake(w)
        except PEER_ERRORS as error:
            missing.append(Unavailable(name=name, reason=one_line(error)))
        else:
            found.append(library)
    return found, missing


def bench(
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[str, ...],
    scale_rule: mxfp4.ScaleRule,
    num_repeats: int,
    peer_experts: int | None = None,
    seed: int = 0,
) -> QuantBench:
    """Times everything on random weights of `shape` [experts, out, in]. Raises ValueError for bad arguments."""
    if len(shape) != 3 or min(shape) < 1 or shape[-1] % mxfp4.BLOCK_SIZE:
        raise ValueError(f"--shape is experts,out,in with in a multiple of {mxfp4.BLOCK_SIZE}, got {shape}")
    if scale_rule not in get_args(mxfp4.ScaleRule):
        raise ValueError(f"unknown scale rule {scale_rule!r}: choose one of {', '.join(get_args(mxfp4.ScaleRule))}")
    if num_repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {num_repeats}")
    if peer_experts is not None and not 1 <= peer_experts <= shape[0]:
        raise ValueError(f"--peer-experts must be between 1 and {shape[0]}, got {peer_experts}")
    probe = torch.ones(1, mxfp4.BLOCK_SIZE, device=device)
    if kernels_for(probe) is None:
        logging.getLogger(__name__).warning("no kernels on %s here: speedstack is its PyTorch reference", device)
    timings: list[QuantTiming] = []
    unavailable: dict[str, Unavailable] = {}
    for dtype_name in dtypes:
        generator = torch.Generator(device).manual_seed(seed)
        w = torch.empty(shape, dtype=DTYPES[dtype_name], device=device).normal_(0, 0.02, generator=generator)
        peers, missing = available(scale_rule, w[0, :32].contiguous())
        unavailable |= {each.name: each for each in missing}
        libraries = [ours(scale_rule), reference(scale_rule), *peers]
        timings += _measure(w, dtype_name, libraries, num_repeats, peer_experts or shape[0], random.Random(seed))
        del w
    return QuantBench(
        environment=describe_environment(),
        device=str(device),
        shape=shape,
        scale_rule=scale_rule,
        peer_versions={name: importlib.metadata.version(name) for name in PEERS if name not in unavailable},
        timings=tuple(timings),
        unavailable=tuple(unavailable.values()),
    )


def _measure(
    w: torch.Tensor,
    dtype_name: str,
    libraries: list[Library],
    num_repeats: int,
    peer_experts: int,
    orders: random.Random,
) -> list[QuantTiming]:
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
    seconds: dict[tuple[Operation, str], list[float]] = {key: [] for key in calls}
    for repeat in range(num_repeats):
        for key in orders.sample(list(calls), len(calls)):
            elapsed = _seconds(calls[key], w.device)
            seconds[key].append(elapsed)
            print(f"{dtype_name} repeat {repeat + 1}: {key[0]} {key[1]} {elapsed:.4f} s", file=sys.stderr)
    weight_bytes = w[0].nbytes
    packed_bytes = w[0].numel() // 2 + w[0].numel() // mxfp4.BLOCK_SIZE
    bytes_an_expert = {"copy": 2 * weight_bytes, "fake_quantize": 2 * weight_bytes}
    copy_rate = 2 * w.nbytes / spread(seconds["copy", COPY]).median
    timings = []
    for (operation, name), values in seconds.items():
        num_bytes = bytes_an_expert.get(operation, weight_bytes + packed_bytes) * num_experts[name]
        times = spread(values)
        ours_times = seconds.get((operation, OURS))
        timings.append(
            QuantTiming(
                operation=operation,
                dtype=dtype_name,
                contestant=name,
                num_experts=num_experts[name],
                seconds=times,
                num_bytes=num_bytes,
                bytes_per_second=num_bytes / times.median,
                fraction_of_copy=num_bytes / times.median / copy_rate,
                times_ours=times.median / num_experts[name] / (spread(ours_times).median / len(w))
                if ours_times
                else None,
                relative_squared_error=errors.get(name),
            )
        )
    return timings


def _for_each(function: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
    return [function(part) for part in parts]


def _unpack_each(library: Library, packed: list[Any], dtype: torch.dtype) -> list[torch.Tensor]:
    return [library.unpack(each, dtype) for each in packed]


def _relative_squared_error(library: Library, w: torch.Tensor) -> float:
    error = library.unpack(library.pack(w), torch.float32).double() - w.double()
    return (error.square().sum() / w.double().square().sum()).item()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call with fresh memory for its result; freeing that on a CPU is left out."""
    if device.type == "cuda":
        return _cuda_seconds(call)
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _cuda_seconds(call: Callable[[], Any], num_calls: int = 10) -> float:
    """Mean of calls in a row by the device's clock: one call takes little longer than starting it."""
    call()  # compiles, and warms the allocator
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / num_calls


def show(result: QuantBench, console: Console) -> None:
    """The result as a table."""
    table = Table(title=f"MXFP4, {tuple(result.shape)} on {result.device}, rule {result.scale_rule}")
    for column in (
        "operation",
        "dtype",
        "contestant",
        "experts",
        "median s",
        "min-max s",
        "GB/s",
        "of copy",
        "x ours",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("operation", "dtype", "contestant") else "right")
    for each in sorted(result.timings, key=lambda t: (t.dtype, t.operation, t.seconds.median)):
        table.add_row(
            each.operation,
            each.dtype,
            each.contestant,
            str(each.num_experts),
            f"{each.seconds.median:.4f}",
            f"{each.seconds.minimum:.4f}-{each.seconds.maximum:.4f}",
            f"{each.bytes_per_second / 1e9:.2f}",
            f"{each.fraction_of_copy:.2f}",
            "" if each.times_ours is None else f"{each.times_ours:.1f}",
            "" if each.relative_squared_error is None else f"{each.relative_squared_error:.5f}",
        )
    console.print(table)
    for missing in result.unavailable:
        console.print(f"{missing.name} skipped: {missing.reason}")


def main(arguments: list[str] | None = None) -> None:
    """Command line; a setting that cannot be measured ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m speedstack.eval.bench_quant", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--shape", default=",".join(map(str, SHAPE)), help="experts,out,in (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="default: %(default)s")
    parser.add_argument("--scale-rule", default=mxfp4.DEFAULT_SCALE_RULE, help="default: %(default)s")
    parser.add_argument("--peer-experts", type=int, help="how many experts the others get (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        dtypes = tuple(options.dtypes.split(","))
        if unknown := [name for name in dtypes if name not in DTYPES]:
            raise ValueError(f"unknown dtype {unknown[0]!r}; use {' or '.join(DTYPES)}")
        shape = tuple(int(size) for size in options.shape.split(","))
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here")
        result = bench(shape, device, dtypes, options.scale_rule, options.repeats, options.peer_experts)
    except (ValueError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
    if options.out is not None:
        result.save(options.out)
    console = Console()
    # A file or a pipe has no width: nothing is cut off there.
    show(result, console if console.is_terminal else Console(width=160))
    if options.out is not None:
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()

"""Speed of MXFP4 quantization, dequantization and fake-quantization, against other libraries.

    python -m speedstack.eval.microbench.quant [--out results/x.json] [--device cuda] [--shape 128,1536,2048]

The default shape is gate and up projection of one layer of Qwen3-30B-A3B's experts. Contestants take turns in random
order, and medians are compared. Ours takes the whole layer. On a CPU the others take it expert by expert, as they are
used and so that temporaries stay in cache; on a GPU as one matrix, to save launches. `--peer-experts N` gives them the
first N experts: their time is proportional. Rounding may differ: torchao uses our rule, compressed-tensors its own
(equal values by default), ModelOpt rounds scales up; `relative_squared_error` compares them.

Bytes are the minimum an operation reads and writes; a copy shows what memory allows.
"""

import importlib.metadata
import logging
import random
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from speedstack.eval.microbench.quant_race import (
    COPY,
    OURS,
    PEERS,
    Samples,
    ours,
    peer_libraries,
    reference,
    time_libraries,
)
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import QuantBench, QuantTiming
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.results.table import Column, Table, words
from speedstack.eval.speed.harness import spread
from speedstack.quant import mxfp4
from speedstack.quant.kernels import kernels_for
from speedstack.support.command import module_command, module_parser, show_result

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPE = (128, 1536, 2048)


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
        peers, missing = peer_libraries(scale_rule, w[0, :32].contiguous())
        unavailable |= {name: Unavailable(name=name, reason=reason) for name, reason in missing.items()}
        libraries = [ours(scale_rule), reference(scale_rule), *peers]
        samples = time_libraries(
            w, libraries, num_repeats, peer_experts or shape[0], random.Random(seed), title=dtype_name
        )
        timings += _timings(dtype_name, samples)
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


def _timings(dtype_name: str, samples: list[Samples]) -> list[QuantTiming]:
    medians = {(each.operation, each.contestant): spread(each.seconds).median for each in samples}
    (copy,) = (each for each in samples if each.operation == "copy")
    copy_rate = copy.num_bytes / medians["copy", COPY]
    timings = []
    for each in samples:
        median = medians[each.operation, each.contestant]
        ours_median = medians.get((each.operation, OURS))
        timings.append(
            QuantTiming(
                operation=each.operation,
                dtype=dtype_name,
                contestant=each.contestant,
                num_experts=each.num_experts,
                seconds=spread(each.seconds),
                num_bytes=each.num_bytes,
                bytes_per_second=each.num_bytes / median,
                fraction_of_copy=each.num_bytes / median / copy_rate,
                # Ours is called on the whole layer, as the copy is.
                times_ours=median / each.num_experts / (ours_median / copy.num_experts) if ours_median else None,
                relative_squared_error=each.relative_squared_error,
            )
        )
    return timings


COLUMNS = (
    words("operation", "operation"),
    words("dtype", "dtype"),
    words("contestant", "contestant"),
    Column("experts", "", "num_experts"),
    Column("median s", "", "seconds.median", ".4f"),
    Column("min-max s", "", lambda one: f"{one.seconds.minimum:.4f}-{one.seconds.maximum:.4f}"),
    Column("GB/s", "", "bytes_per_second", ".2f", 1e-9),
    Column("of copy", "", "fraction_of_copy", ".2f"),
    Column("x ours", "", "times_ours", ".1f"),
    Column("error", "", "relative_squared_error", ".5f"),
)


def show(result: QuantBench) -> str:
    """The result as text."""
    timings = sorted(result.timings, key=lambda one: (one.dtype, one.operation, one.seconds.median))
    return "\n".join(
        [
            f"MXFP4, {result.shape} on {result.device}, rule {result.scale_rule}",
            Table.of(COLUMNS, timings).text(),
            *(f"{missing.name} skipped: {missing.reason}" for missing in result.unavailable),
        ]
    )


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print a table, write JSON."""
    parser = module_parser(__spec__, __doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--shape", default=",".join(map(str, SHAPE)), help="experts,out,in (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="default: %(default)s")
    parser.add_argument("--scale-rule", default=mxfp4.DEFAULT_SCALE_RULE, help="default: %(default)s")
    parser.add_argument("--peer-experts", type=int, help="how many experts the others get (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(arguments)
    dtypes = tuple(options.dtypes.split(","))
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"unknown dtype {unknown[0]!r}; use {' or '.join(DTYPES)}")
    shape = tuple(int(size) for size in options.shape.split(","))
    device = _device_named(options.device)
    result = bench(shape, device, dtypes, options.scale_rule, options.repeats, options.peer_experts)
    show_result(result, show(result), options.out)


def _device_named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here")
    return device


if __name__ == "__main__":
    sys.exit(main())

"""What training a drafter costs: time of a step against speculators' DFlash, and memory of the loss.

    PYTHONPATH=SIDE python -m speedstack.eval.microbench.drafter --out results/DATE-drafter-cpu.json

SIDE is where speculators lies, if it is not installed (`pip install --no-deps --target SIDE speculators`); without it
its rows are left out, with a line that says so.

Time is of an optimizer step (AdamW on both sides) on random features of the same sizes: forward, loss against the
target's tokens (`ce`) or its distribution (`kl`), backward, update. speculators packs all windows into one sequence, so
that every block is compared with every position of every window; it is also run window by window with the gradients
added up, and with each attention of its that runs on a CPU, and its fastest way counts. Contestants take turns; medians
are compared. OMP_NUM_THREADS as you train.

Memory is of LM head and loss alone, each way in a process of its own: chunked as here, and all logits at once under
autograd.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from speedstack.dflash.loss import block_loss, offset_weights
from speedstack.eval.microbench.drafter_race import LOSSES, PEER_WAYS, SHAPES, Batch, Loss, Shape, our_step, peer_step
from speedstack.eval.microbench.process_memory import peak_bytes, restart_peak
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.kinds import Document, Environment, Record, Unavailable
from speedstack.support.command import module_command, module_parser, show_result

WAYS = ("chunked", "plain")


class StepTimes(Record):
    """Milliseconds of each timed step of one contestant, and of processor time of all its threads."""

    contestant: str
    step_ms: tuple[float, ...]
    step_cpu_ms: tuple[float, ...]
    median_ms: float
    median_cpu_ms: float
    num_blocks: int


class ShapeTimes(Record):
    """All contestants on one shape and loss. `speedup`: the fastest of speculators' medians over ours.

    On a machine that does other work the ratio of processor time says more.
    """

    shape: Shape
    loss: Loss
    contestants: tuple[StepTimes, ...]
    speedup: float | None
    cpu_speedup: float | None


class LossMemory(Record):
    """Peak memory of head, loss and gradient above what the process held before, in bytes."""

    way: str
    num_positions: int
    hidden_size: int
    vocab_size: int
    logits_bytes: int
    peak_bytes: int


class DrafterCost(Document):
    kind: Literal["drafter_cost"] = "drafter_cost"
    environment: Environment
    peer_version: str | None
    times: tuple[ShapeTimes, ...]
    memory: tuple[LossMemory, ...]
    unavailable: tuple[Unavailable, ...] = ()


def measure_steps(shape: Shape, loss: Loss, num_steps: int, with_peer: bool) -> ShapeTimes:
    """Steps of every contestant in turns; the first of each warms up."""
    batch = Batch(shape)
    steps = {"speedstack": our_step(shape, loss, batch)}
    if with_peer:
        for attention, is_packed in PEER_WAYS:
            name = f"speculators, {attention}, {'packed' if is_packed else 'window by window'}"
            steps[name] = peer_step(shape, loss, batch, attention, is_packed)
    wall_ms: dict[str, list[float]] = {name: [] for name in steps}
    cpu_ms: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(num_steps + 1):
        for name, step in steps.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            step(index)
            cpu_ms[name].append(1e3 * (time.process_time() - cpu_started))
            wall_ms[name].append(1e3 * (time.perf_counter() - started))
    contestants = [
        StepTimes(
            contestant=name,
            step_ms=tuple(wall_ms[name][1:]),
            step_cpu_ms=tuple(cpu_ms[name][1:]),
            median_ms=statistics.median(wall_ms[name][1:]),
            median_cpu_ms=statistics.median(cpu_ms[name][1:]),
            num_blocks=shape.num_windows * shape.num_anchors,
        )
        for name in steps
    ]
    ours, *peers = contestants
    return ShapeTimes(
        shape=shape,
        loss=loss,
        contestants=tuple(contestants),
        speedup=min(peer.median_ms for peer in peers) / ours.median_ms if peers else None,
        cpu_speedup=min(peer.median_cpu_ms for peer in peers) / ours.median_cpu_ms if peers else None,
    )


def plain_loss(hidden_AJD: Tensor, labels_AJ: Tensor, valid_AJ: Tensor, head_VD: Tensor) -> Tensor:
    """All logits at once, and autograd."""
    nll_AJ = nn.functional.cross_entropy((hidden_AJD @ head_VD.T).flatten(0, 1), labels_AJ.flatten(), reduction="none")
    weight_AJ = offset_weights(hidden_AJD.shape[1], 4.0) * valid_AJ
    return (weight_AJ * nll_AJ.view_as(labels_AJ)).sum() / weight_AJ.sum()


def measure_memory(way: str, num_blocks: int, hidden_size: int, vocab_size: int) -> LossMemory:
    """Peak of head, loss and gradient in this process, which should not have done anything else. Linux only."""
    num_offsets = 7
    generator = torch.Generator().manual_seed(0)
    hidden_AJD = torch.randn(num_blocks, num_offsets, hidden_size, generator=generator, requires_grad=True)
    head_VD = torch.randn(vocab_size, hidden_size, generator=generator) * 0.05
    labels_AJ = torch.randint(vocab_size, (num_blocks, num_offsets), generator=generator)
    valid_AJ = torch.ones_like(labels_AJ, dtype=torch.bool)
    plain_loss(hidden_AJD[:1], labels_AJ[:1], valid_AJ[:1], head_VD)  # buffers of a first product are nobody's
    before = restart_peak()
    if way == "chunked":
        block_loss(hidden_AJD, labels_AJ, valid_AJ, head_VD).loss.backward()
    else:
        plain_loss(hidden_AJD, labels_AJ, valid_AJ, head_VD).backward()
    return LossMemory(
        way=way,
        num_positions=num_blocks * num_offsets,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        logits_bytes=num_blocks * num_offsets * vocab_size * torch.float32.itemsize,
        peak_bytes=peak_bytes() - before,
    )


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print a table, write JSON."""
    parser = module_parser(__spec__, __doc__)
    parser.add_argument("--num-steps", type=int, default=8, help="timed steps of each contestant")
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="shapes; none: all")
    parser.add_argument("--num-blocks", type=int, default=256, help="blocks of the memory measurement")
    parser.add_argument("--hidden-size", type=int, default=1024, help="hidden size of the memory measurement")
    parser.add_argument("--vocab-size", type=int, default=32768, help="vocabulary of the memory measurement")
    parser.add_argument("--way", choices=WAYS, help="measure this way's memory in this process, and print it")
    options = parser.parse_args(arguments)
    sizes = (options.num_blocks, options.hidden_size, options.vocab_size)
    if options.way:
        print(measure_memory(options.way, *sizes).model_dump_json())
        return
    peer = importlib.util.find_spec("speculators")
    unavailable = []
    if peer is None:
        reason = "speculators is not installed: pip install --no-deps --target SIDE speculators, PYTHONPATH=SIDE"
        unavailable.append(Unavailable(name="speculators", reason=reason))
        print(f"left out: {reason}", file=sys.stderr)
    chosen = [shape for shape in SHAPES if options.shapes is None or shape.name in options.shapes]
    times = [measure_steps(shape, loss, options.num_steps, peer is not None) for shape in chosen for loss in LOSSES]
    memory = []
    for way in WAYS:
        command = [sys.executable, "-m", "speedstack.eval.microbench.drafter", "--way", way]
        for name, size in zip(("num-blocks", "hidden-size", "vocab-size"), sizes, strict=True):
            command += [f"--{name}", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory.append(LossMemory.model_validate(json.loads(done.stdout.splitlines()[-1])))
    version = None if peer is None else importlib.metadata.version("speculators")
    result = DrafterCost(
        environment=describe_environment(),
        peer_version=version,
        times=tuple(times),
        memory=tuple(memory),
        unavailable=tuple(unavailable),
    )
    show_result(result, _table(result), options.out)


def _table(result: DrafterCost) -> str:
    lines = []
    for entry in result.times:
        lines.append(f"{entry.shape.name}, {entry.loss}")
        if entry.speedup is not None:
            lines[-1] += f": {entry.speedup:.2f}x speculators' fastest (CPU {entry.cpu_speedup:.2f}x)"
        for item in entry.contestants:
            times = f"{item.median_ms:9.1f} ms a step, CPU {item.median_cpu_ms:9.1f} ms"
            lines.append(f"  {item.contestant:40}{times}")
    mib = 2**20
    for held in result.memory:
        logits = f"logits alone {held.logits_bytes / mib:.0f} MiB"
        lines.append(f"loss {held.way:8} peak {held.peak_bytes / mib:8.1f} MiB ({logits})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Cost of training a drafter: step time against speculators' DFlash, and memory of the loss.

    PYTHONPATH=SIDE python -m speedstack.eval.microbench.drafter --out results/DATE-drafter-cpu.json

SIDE holds speculators if it is not installed (`pip install --no-deps --target SIDE speculators`); without it, its rows
are omitted with a note.

An optimizer step is AdamW on random features of equal size: forward, loss against the target's tokens (`ce`) or its
distribution (`kl`), backward, update. speculators packs all windows into one sequence, so that every block is compared
with every position of every window; it also runs window by window with accumulated gradients, and with each attention
that runs on a CPU. Its fastest variant counts. Contestants take turns, and medians are compared. Set OMP_NUM_THREADS as
for training.

Memory is of LM head and loss, each way in its own process: chunked as here, and all logits at once under autograd.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speedstack.dflash.loss import block_loss, offset_weights
from speedstack.eval.microbench.drafter_race import LOSSES, PEER_WAYS, SHAPES, Batch, Loss, our_step, peer_step
from speedstack.eval.microbench.harness import PeakMemory, Stopwatch, available, in_own_process, in_turns
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.failures import PeerFailure
from speedstack.eval.results.microbench import DrafterCost, LossMemory, Shape, ShapeTimes, StepTimes
from speedstack.eval.results.schema import Unavailable
from speedstack.support.command import module_command, module_parser, show_result

WAYS = ("chunked", "plain")
PEER = "speculators"


def measure_steps(shape: Shape, loss: Loss, num_steps: int, with_peer: bool) -> ShapeTimes:
    """Steps of every contestant in turns, after a warm-up."""
    batch = Batch(shape)
    steps = {"speedstack": our_step(shape, loss, batch)}
    if with_peer:
        for attention, is_packed in PEER_WAYS:
            name = f"{PEER}, {attention}, {'packed' if is_packed else 'window by window'}"
            steps[name] = peer_step(shape, loss, batch, attention, is_packed)

    def run(name: str, turn: int) -> Stopwatch:
        with Stopwatch() as watch:
            steps[name](turn)
        return watch

    num_blocks = shape.num_windows * shape.num_anchors
    ours, *peers = (_step_times(name, watches, num_blocks) for name, watches in in_turns(steps, run, num_steps).items())
    return ShapeTimes(
        shape=shape,
        loss=loss,
        contestants=(ours, *peers),
        speedup=min(peer.median_ms for peer in peers) / ours.median_ms if peers else None,
        cpu_speedup=min(peer.median_cpu_ms for peer in peers) / ours.median_cpu_ms if peers else None,
    )


def _step_times(name: str, watches: Sequence[Stopwatch], num_blocks: int) -> StepTimes:
    step_ms, step_cpu_ms = tuple(one.wall_ms for one in watches), tuple(one.cpu_ms for one in watches)
    return StepTimes(
        contestant=name,
        step_ms=step_ms,
        step_cpu_ms=step_cpu_ms,
        median_ms=statistics.median(step_ms),
        median_cpu_ms=statistics.median(step_cpu_ms),
        num_blocks=num_blocks,
    )


def plain_loss(hidden_AJD: Tensor, labels_AJ: Tensor, valid_AJ: Tensor, head_VD: Tensor) -> Tensor:
    """All logits at once, under autograd."""
    nll_AJ = nn.functional.cross_entropy((hidden_AJD @ head_VD.T).flatten(0, 1), labels_AJ.flatten(), reduction="none")
    weight_AJ = offset_weights(hidden_AJD.shape[1], 4.0) * valid_AJ
    return (weight_AJ * nll_AJ.view_as(labels_AJ)).sum() / weight_AJ.sum()


def measure_memory(way: str, num_blocks: int, hidden_size: int, vocab_size: int) -> LossMemory:
    """Peak of head, loss and gradient in this process, which must be fresh. Linux only."""
    num_offsets = 7
    generator = torch.Generator().manual_seed(0)
    hidden_AJD = torch.randn(num_blocks, num_offsets, hidden_size, generator=generator, requires_grad=True)
    head_VD = torch.randn(vocab_size, hidden_size, generator=generator) * 0.05
    labels_AJ = torch.randint(vocab_size, (num_blocks, num_offsets), generator=generator)
    valid_AJ = torch.ones_like(labels_AJ, dtype=torch.bool)
    plain_loss(hidden_AJD[:1], labels_AJ[:1], valid_AJ[:1], head_VD)  # buffers of a first product are nobody's
    memory = PeakMemory()
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
        peak_bytes=memory.peak_bytes(),
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
    found, missing = available({PEER: _peer_version})
    for reason in missing.values():
        print(f"left out: {reason}", file=sys.stderr)
    chosen = [shape for shape in SHAPES if options.shapes is None or shape.name in options.shapes]
    times = [measure_steps(shape, loss, options.num_steps, PEER in found) for shape in chosen for loss in LOSSES]
    result = DrafterCost(
        environment=describe_environment(),
        peer_version=found.get(PEER),
        times=tuple(times),
        memory=tuple(in_own_process(f"the {way} loss", measure_memory, way, *sizes) for way in WAYS),
        unavailable=tuple(Unavailable(name=name, reason=reason) for name, reason in missing.items()),
    )
    show_result(result, _text(result), options.out)


def _peer_version() -> str:
    if importlib.util.find_spec(PEER) is None:
        raise PeerFailure(f"{PEER} is not installed: pip install --no-deps --target SIDE {PEER}, PYTHONPATH=SIDE")
    return importlib.metadata.version(PEER)


def _text(result: DrafterCost) -> str:
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

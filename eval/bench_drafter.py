"""What training a drafter costs: time of a step against speculators' DFlash, and memory of the loss.

    PYTHONPATH=SIDE python -m speedstack.eval.bench_drafter --out results/DATE-drafter-cpu.json

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

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from speedstack.dflash.block import layer_masks, make_blocks, sample_anchors
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.loss import Objective, block_loss, offset_weights
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.environment import describe_environment
from speedstack.eval.results import Document, Environment, Record, Unavailable

Loss = Literal["ce", "kl"]
LOSSES: tuple[Loss, ...] = ("ce", "kl")
OBJECTIVES = {"ce": Objective(), "kl": Objective(ce=0.0, kl=1.0)}
PEER_LOSSES = {"ce": "ce", "kl": "kl_div"}
WAYS = ("chunked", "plain")


class Shape(Record):
    """Sizes of a drafter and of its batch."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_taps: int
    vocab_size: int
    num_windows: int = 8
    length: int = 256
    num_anchors: int = 32
    block_size: int = 8

    def config(self) -> DFlashConfig:
        """The drafter of this shape."""
        return DFlashConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            mask_token_id=2,
            target_layer_ids=tuple(range(self.num_taps)),
            num_target_layers=self.num_taps,
            block_size=self.block_size,
        )


SHAPES = (
    Shape(
        name="tiny",
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        num_taps=6,
        vocab_size=4096,
    ),
    Shape(
        name="larger",
        hidden_size=512,
        intermediate_size=1536,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_taps=5,
        vocab_size=16384,
        num_windows=4,
    ),
)


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


class Batch:
    """Random windows of a shape: tokens, tapped features, final hidden states, embedding and head."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (shape.num_windows, shape.length)
        self.ids_BT = torch.randint(3, shape.vocab_size, size, generator=generator)
        self.features_BTC = torch.randn(*size, shape.num_taps * shape.hidden_size, generator=generator)
        self.final_BTD = torch.randn(*size, shape.hidden_size, generator=generator)
        self.embedding_VD = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.1
        self.head_VD = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.05


Step = Callable[[int], None]


def our_step(shape: Shape, loss: Loss, batch: Batch) -> Step:
    """An optimizer step of this package's drafter, as `speedstack.train.drafter` makes it."""
    config = shape.config()
    model = DFlashDraftModel(config)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    documents_BT, everything_BT = torch.zeros_like(batch.ids_BT), torch.ones_like(batch.ids_BT, dtype=torch.bool)
    positions_BT = torch.arange(shape.length).expand_as(batch.ids_BT)

    def step(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        anchors_BA, real_BA = sample_anchors(documents_BT, everything_BT, shape.num_anchors, generator)
        blocks = make_blocks(
            batch.ids_BT, documents_BT, everything_BT, anchors_BA, real_BA, config.block_size, config.mask_token_id
        )
        hidden_BQD = model(
            batch.features_BTC,
            positions_BT,
            model.embed_block(blocks.input_ids_BQ, batch.embedding_VD),
            blocks.positions_BQ,
            layer_masks(config, documents_BT, anchors_BA),
        )
        window_B11 = torch.arange(shape.num_windows)[:, None, None]
        result = block_loss(
            hidden_BQD.unflatten(1, (-1, config.block_size)).flatten(0, 1)[:, model.hidden_slots],
            blocks.labels_BAJ.flatten(0, 1),
            blocks.valid_BAJ.flatten(0, 1),
            batch.head_VD,
            objective=OBJECTIVES[loss],
            target_hidden_AJD=batch.final_BTD[window_B11, blocks.before_BAJ].flatten(0, 1) if loss == "kl" else None,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(shape: Shape, loss: Loss, batch: Batch, attention: str, is_packed: bool) -> Step:
    """An optimizer step of speculators' DFlash model and loss on the same features.

    speculators takes its labels from the target's logits, whose argmax `ce` is the cross-entropy of, so it multiplies
    the target's final hidden states by the head for either loss.
    """
    from speculators import SpeculatorsConfig, VerifierConfig  # type: ignore[import-not-found]
    from speculators.losses import resolve_loss_config  # type: ignore[import-not-found]
    from speculators.models.dflash import DFlashSpeculatorConfig  # type: ignore[import-not-found]
    from speculators.models.dflash.core import DFlashDraftModel as Peer  # type: ignore[import-not-found]
    from speculators.proposals.greedy import GreedyTokenProposalConfig  # type: ignore[import-not-found]
    from transformers import Qwen3Config

    layer_config = Qwen3Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
    )
    layer_config._attn_implementation = attention
    verifier = tempfile.mkdtemp(prefix="speedstack-bench-")  # it looks there for the kind of final norm
    layer_config.save_pretrained(verifier)
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layer_config,
        draft_vocab_size=shape.vocab_size,
        block_size=shape.block_size,
        aux_hidden_state_layer_ids=list(range(1, shape.num_taps + 1)),
        mask_token_id=2,
        speculators_config=SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=shape.block_size - 1)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=verifier, architectures=["Qwen3ForCausalLM"]),
        ),
    )
    model: Any = Peer(config)
    shutil.rmtree(verifier)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(batch.embedding_VD)
        for linear in (model.lm_head, model.verifier_lm_head):
            linear.weight.copy_(batch.head_VD)
        model.verifier_norm.weight.fill_(1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    loss_config = resolve_loss_config(PEER_LOSSES[loss], "eager")  # its fused ones are Triton kernels
    documents_BT = torch.arange(shape.num_windows)[:, None].expand_as(batch.ids_BT)
    positions_BT = torch.arange(shape.length).expand_as(batch.ids_BT)
    parts = [slice(None)] if is_packed else [slice(row, row + 1) for row in range(shape.num_windows)]

    def step(index: int) -> None:
        torch.manual_seed(index)
        for rows in parts:
            ids_BT = batch.ids_BT[rows]
            _, value, _ = model(
                batch.features_BTC[rows].flatten(0, 1)[None],
                ids_BT.reshape(1, -1),
                torch.ones(1, ids_BT.numel()),
                batch.final_BTD[rows].flatten(0, 1)[None],
                documents_BT[rows].reshape(1, -1),
                positions_BT[rows].reshape(1, -1),
                loss_config=loss_config,
                max_anchors=shape.num_anchors * len(ids_BT),
            )
            (value / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


PEER_WAYS = (("sdpa", False), ("sdpa", True), ("eager", False))


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
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
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
        peak_bytes=_memory("VmHWM") - before,
    )


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m speedstack.eval.bench_drafter", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="result file")
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
        return 0
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
        command = [sys.executable, "-m", "speedstack.eval.bench_drafter", "--way", way]
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
    print(_table(result))
    if options.out is not None:
        print(f"written to {result.save(options.out)}")
    return 0


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

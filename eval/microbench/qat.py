"""What fake-quantized experts cost in training: memory kept for the backward, peak memory, time of a step.

    python -m speedstack.eval.microbench.qat --model runs/demo/pretrain/export --out results/DATE-qat-cpu.json

Memory is of a stack of expert layers of Qwen3-30B-A3B's shape under bfloat16 autocast, with fewer experts than the
model's 128 where a laptop has to hold them: what is kept is proportional to their number. Contestants are the packed
backward (`quant/grouped.py`) and the plain way, autograd over dense fake-quantized weights. Each runs in a process of
its own, because memory that a process has freed still counts as its own.

Time is of an optimizer step of a whole model on random tokens, next-token loss, without a teacher: fake-quant is a
smaller part of a step that has one. Contestants take turns, and medians are compared; OMP_NUM_THREADS as you train.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

from speedstack.eval.microbench.process_memory import give_back_freed, peak_bytes, resident_bytes, restart_peak
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.kinds import Document, Environment, Record
from speedstack.quant.checkpoint import load_model
from speedstack.quant.experts import (
    contraction_last,
    enable_autocast,
    enable_fake_quant,
    expert_parameters,
    weight_names,
)
from speedstack.quant.grouped import WeightForm, experts_forward
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, fake_quantize
from speedstack.support.command import module_command, module_parser, show_result

Way = Literal["packed", "plain"]
WAYS: tuple[Way, ...] = ("packed", "plain")
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class LayerShape:
    """Expert layers of Qwen3-30B-A3B, which has 128 experts in each of 48 layers."""

    hidden_size: int = 2048
    intermediate_size: int = 768
    num_experts: int = 16
    num_experts_per_tok: int = 8
    num_layers: int = 4
    num_tokens: int = 512


class LayerMemory(Record):
    """Bytes. What autograd keeps for the backward of one layer, weights apart from all else; and the process's memory
    above what it had before the first forward: after the last forward, and at its highest, gradients included."""

    way: Way
    kept_weight_bytes: int
    kept_other_bytes: int
    forward_bytes: int
    peak_bytes: int


class StepTime(Record):
    """Milliseconds of each timed optimizer step, with fake-quant and without, and of processor time of all its threads.

    The ratios are those of the medians; on a machine that does other work the one of processor time says more.
    """

    precision: Precision
    fake_quant_ms: tuple[float, ...]
    plain_ms: tuple[float, ...]
    fake_quant_cpu_ms: tuple[float, ...]
    plain_cpu_ms: tuple[float, ...]
    ratio: float
    cpu_ratio: float
    num_parameters: int
    num_expert_parameters: int
    num_tokens: int


class QatCost(Document):
    kind: Literal["qat_cost"] = "qat_cost"
    environment: Environment
    layer_shape: dict[str, int]
    layers: tuple[LayerMemory, ...]
    steps: tuple[StepTime, ...]


def plain_experts_forward(module: nn.Module, *inputs: torch.Tensor, form: WeightForm) -> torch.Tensor:
    """The plain way: dense weights, fake-quantized and cast under autograd, into transformers' own forward."""
    weights = {}
    for name in weight_names(module):
        weight = getattr(module, name)
        if form.scale_rule is not None:
            weight = contraction_last(module, fake_quantize(contraction_last(module, weight), form.scale_rule))
            weight = weight.contiguous()
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        weights[name] = weight
    return grouped_mm_experts_forward(cast(nn.Module, _WithWeights(module, weights)), *inputs)


class _WithWeights:
    """An experts module as transformers' forward sees it, with other weights."""

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self._module = module
        self.__dict__.update(weights)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


FORWARDS: dict[Way, Callable[..., torch.Tensor]] = {"packed": experts_forward, "plain": plain_experts_forward}


def measure_layers(way: Way, shape: LayerShape) -> LayerMemory:
    """Forward and backward through the layers, in this process, which should not have done anything else."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
    )
    generator = torch.Generator().manual_seed(0)
    layers = [Qwen3MoeExperts(config) for _ in range(shape.num_layers)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
    hidden_TH = torch.randn(shape.num_tokens, shape.hidden_size, generator=generator).requires_grad_(True)
    choices_TJ = torch.rand(shape.num_tokens, shape.num_experts, generator=generator).argsort(dim=-1)
    choices_TJ = choices_TJ[:, : shape.num_experts_per_tok]
    weights_TJ = torch.full(choices_TJ.shape, 1.0 / shape.num_experts_per_tok)
    form = WeightForm(DEFAULT_SCALE_RULE)

    own = {parameter.untyped_storage().data_ptr() for layer in layers for parameter in layer.parameters()}
    kept: dict[int, tuple[bool, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Of what the layers keep, weights alone have three dimensions.
            kept[storage.data_ptr()] = (tensor.ndim == 3, storage.nbytes())
        return tensor

    # The first product of a process allocates buffers that are nobody's.
    with torch.autocast("cpu", torch.bfloat16):
        FORWARDS[way](layers[0], hidden_TH[:32].detach(), choices_TJ[:32], weights_TJ[:32], form=WeightForm(None))
    give_back_freed()
    before = restart_peak()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    x_TH = hidden_TH
    with hooks, torch.autocast("cpu", torch.bfloat16):
        for layer in layers:
            x_TH = x_TH + FORWARDS[way](layer, x_TH, choices_TJ, weights_TJ, form=form)
    give_back_freed()
    forward = resident_bytes() - before
    x_TH.square().mean().backward()
    peak = peak_bytes() - before
    return LayerMemory(
        way=way,
        kept_weight_bytes=sum(size for is_weight, size in kept.values() if is_weight) // shape.num_layers,
        kept_other_bytes=sum(size for is_weight, size in kept.values() if not is_weight) // shape.num_layers,
        forward_bytes=forward,
        peak_bytes=peak,
    )


def measure_steps(
    model: PreTrainedModel, precision: Precision, num_steps: int, num_sequences: int, sequence_length: int
) -> StepTime:
    """Steps of AdamW over the experts of `model` (float32, on a CPU), with fake-quant and without, in turns."""
    experts = list(expert_parameters(model).values())
    model.requires_grad_(False).train()
    for parameter in experts:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(experts, lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    wall_ms: dict[str, list[float]] = {"fake_quant": [], "plain": []}
    cpu_ms: dict[str, list[float]] = {"fake_quant": [], "plain": []}
    for index in range(num_steps + 1):
        for name, enable in (("fake_quant", enable_fake_quant), ("plain", enable_autocast)):
            enable(model)
            ids_BT = torch.randint(vocab_size, (num_sequences, sequence_length), generator=generator)
            started, cpu_started = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if index:  # the first step of each allocates the optimizer's state and compiles kernels
                wall_ms[name].append(1e3 * (time.perf_counter() - started))
                cpu_ms[name].append(1e3 * (time.process_time() - cpu_started))
    return StepTime(
        precision=precision,
        fake_quant_ms=tuple(wall_ms["fake_quant"]),
        plain_ms=tuple(wall_ms["plain"]),
        fake_quant_cpu_ms=tuple(cpu_ms["fake_quant"]),
        plain_cpu_ms=tuple(cpu_ms["plain"]),
        ratio=statistics.median(wall_ms["fake_quant"]) / statistics.median(wall_ms["plain"]),
        cpu_ratio=statistics.median(cpu_ms["fake_quant"]) / statistics.median(cpu_ms["plain"]),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_expert_parameters=sum(parameter.numel() for parameter in experts),
        num_tokens=num_sequences * sequence_length,
    )


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print a table, write JSON."""
    parser = module_parser(__spec__, __doc__)
    parser.add_argument("--model", type=Path, help="model directory whose steps are timed; none: memory alone")
    parser.add_argument("--num-experts", type=int, default=LayerShape.num_experts, help="experts in a layer")
    parser.add_argument("--num-layers", type=int, default=LayerShape.num_layers, help="layers in the stack")
    parser.add_argument("--num-tokens", type=int, default=LayerShape.num_tokens, help="tokens that go through it")
    parser.add_argument("--num-steps", type=int, default=8, help="timed steps of each contestant")
    parser.add_argument("--way", choices=WAYS, help="measure this way's memory in this process, and print it")
    options = parser.parse_args(arguments)
    shape = LayerShape(num_experts=options.num_experts, num_layers=options.num_layers, num_tokens=options.num_tokens)
    if options.way:
        print(measure_layers(options.way, shape).model_dump_json())
        return
    layers = []
    for way in WAYS:
        command = [sys.executable, "-m", "speedstack.eval.microbench.qat", "--way", way]
        for name in ("num_experts", "num_layers", "num_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(shape, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        layers.append(LayerMemory.model_validate(json.loads(done.stdout.splitlines()[-1])))
    steps = []
    if options.model is not None:
        model = load_model(options.model)
        steps = [
            measure_steps(model, precision, options.num_steps, num_sequences=4, sequence_length=256)
            for precision in PRECISIONS
        ]
    result = QatCost(
        environment=describe_environment(), layer_shape=asdict(shape), layers=tuple(layers), steps=tuple(steps)
    )
    show_result(result, _table(result), options.out)


def _table(result: QatCost) -> str:
    mib = 2**20
    lines = ["MiB     kept a layer: weights, other; of all layers: after the forward, at the peak"]
    for layer in result.layers:
        sizes = (layer.kept_weight_bytes, layer.kept_other_bytes, layer.forward_bytes, layer.peak_bytes)
        lines.append(f"{layer.way:8}" + "".join(f"{size / mib:10.1f}" for size in sizes))
    for step in result.steps:
        with_ms, without_ms = statistics.median(step.fake_quant_ms), statistics.median(step.plain_ms)
        times = f"{with_ms:.0f} ms with fake-quant, {without_ms:.0f} ms without"
        lines.append(f"step in {step.precision}: {times}, {step.ratio:.3f}x (CPU {step.cpu_ratio:.3f}x)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

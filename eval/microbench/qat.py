"""Cost of fake-quantized experts in training: memory kept for the backward, peak memory, step time.

    python -m speedstack.eval.microbench.qat --model runs/demo/pretrain/export --out results/DATE-qat-cpu.json

Memory is of expert layers of Qwen3-30B-A3B's shape under bfloat16 autocast, with fewer than its 128 experts to fit a
laptop: memory is proportional to their number. Contestants are the packed backward (`quant/grouped.py`) and autograd
over dense fake-quantized weights, each in its own process.

Time is of an optimizer step of a whole model on random tokens, without a teacher. Contestants take turns, and medians
are compared. Set OMP_NUM_THREADS as for training.
"""

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

from speedstack.eval.microbench.harness import PeakMemory, Stopwatch, in_own_process, in_turns
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import LayerMemory, QatCost, StepTime
from speedstack.eval.results.table import Column, Table, ratio, words
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


def plain_experts_forward(module: nn.Module, *inputs: torch.Tensor, form: WeightForm) -> torch.Tensor:
    """Dense weights, fake-quantized and cast under autograd, in transformers' own forward."""
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
    """An experts module with other weights."""

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self._module = module
        self.__dict__.update(weights)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


FORWARDS: dict[Way, Callable[..., torch.Tensor]] = {"packed": experts_forward, "plain": plain_experts_forward}


def measure_layers(way: Way, shape: LayerShape) -> LayerMemory:
    """Forward and backward through the layers, in this process, which must be fresh."""
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
    _give_back_free_memory()
    memory = PeakMemory()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    x_TH = hidden_TH
    with hooks, torch.autocast("cpu", torch.bfloat16):
        for layer in layers:
            x_TH = x_TH + FORWARDS[way](layer, x_TH, choices_TJ, weights_TJ, form=form)
    _give_back_free_memory()
    forward_bytes = memory.now_bytes()
    x_TH.square().mean().backward()
    return LayerMemory(
        way=way,
        kept_weight_bytes=sum(size for is_weight, size in kept.values() if is_weight) // shape.num_layers,
        kept_other_bytes=sum(size for is_weight, size in kept.values() if not is_weight) // shape.num_layers,
        forward_bytes=forward_bytes,
        peak_bytes=memory.peak_bytes(),
    )


def measure_steps(
    model: PreTrainedModel, precision: Precision, num_steps: int, num_sequences: int, sequence_length: int
) -> StepTime:
    """AdamW steps over the experts of `model` (float32, on a CPU), with and without fake-quant, in turns."""
    experts = list(expert_parameters(model).values())
    model.requires_grad_(False).train()
    for parameter in experts:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(experts, lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    enable = {"fake_quant": enable_fake_quant, "plain": enable_autocast}

    def step(name: str, turn: int) -> Stopwatch:
        enable[name](model)
        ids_BT = torch.randint(vocab_size, (num_sequences, sequence_length), generator=generator)
        with Stopwatch() as watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return watch

    # The first step of each allocates the optimizer's state and compiles kernels.
    watches = in_turns(enable, step, num_steps)
    wall_ms = {name: tuple(one.wall_ms for one in found) for name, found in watches.items()}
    cpu_ms = {name: tuple(one.cpu_ms for one in found) for name, found in watches.items()}
    return StepTime(
        precision=precision,
        fake_quant_ms=wall_ms["fake_quant"],
        plain_ms=wall_ms["plain"],
        fake_quant_cpu_ms=cpu_ms["fake_quant"],
        plain_cpu_ms=cpu_ms["plain"],
        ratio=statistics.median(wall_ms["fake_quant"]) / statistics.median(wall_ms["plain"]),
        cpu_ratio=statistics.median(cpu_ms["fake_quant"]) / statistics.median(cpu_ms["plain"]),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_expert_parameters=sum(parameter.numel() for parameter in experts),
        num_tokens=num_sequences * sequence_length,
    )


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print, write JSON."""
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
    layers = tuple(in_own_process(f"the {way} backward", measure_layers, way, shape) for way in WAYS)
    steps: list[StepTime] = []
    if options.model is not None:
        model = load_model(options.model)
        steps = [
            measure_steps(model, precision, options.num_steps, num_sequences=4, sequence_length=256)
            for precision in PRECISIONS
        ]
    result = QatCost(environment=describe_environment(), layer_shape=asdict(shape), layers=layers, steps=tuple(steps))
    text = Table.of(LAYER_COLUMNS, layers).text()
    if steps:
        text += f"\n\n{Table.of(STEP_COLUMNS, steps).text()}"
    show_result(result, text, options.out)


MIB = 2.0**-20
LAYER_COLUMNS = (
    words("MiB", "way"),
    Column("weights kept a layer", "", "kept_weight_bytes", ".1f", MIB),
    Column("others kept a layer", "", "kept_other_bytes", ".1f", MIB),
    Column("after the forward", "", "forward_bytes", ".1f", MIB),
    Column("at the peak", "", "peak_bytes", ".1f", MIB),
)
STEP_COLUMNS = (
    words("ms a step in", "precision"),
    Column("with fake-quant", "", lambda step: statistics.median(step.fake_quant_ms), ".0f"),
    Column("without", "", lambda step: statistics.median(step.plain_ms), ".0f"),
    ratio("time", "ratio", form=".3f"),
    ratio("processor time", "cpu_ratio", form=".3f"),
)


def _give_back_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main())

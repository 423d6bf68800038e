"""The peer: transformers with a static cache, compiled to CUDA graphs (`mode="reduce-overhead"`), in bfloat16.

Compiling 48 layers takes minutes, so a whole model's time is extrapolated from two depths; the difference is the time
of the layers between. Models are made on the device with our weight distribution, so that rows choose experts alike.
The faster compiled experts implementation is used. Written for transformers 5.17 and later.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from speedstack.eval.gpu_suite.backends import model_config
from speedstack.eval.gpu_suite.scale import Cell, Scale
from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.speed.device_timing import device_seconds
from speedstack.eval.speed.random_model import draw_weights
from speedstack.runtime.model.device import DTYPES
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.perf.cost import step_cost
from speedstack.runtime.perf.gpus import Gpu
from speedstack.runtime.plan.step import build_plan

EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
WARM_STEPS = 3  # CUDA graphs of torch.compile: one step warms up, one records, one replays
SAMPLE_STEPS = 16  # few, because every step lengthens the cache, which is read whole


class Peer:
    """A model at two depths. Made in a worker."""

    def __init__(self, scale: Scale, model: str, num_layers: int, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self.scale, self.model, self.num_layers = scale, model, num_layers
        self.device = torch.device(scale.device)
        self.depths = scale.peer_layers[model]
        generator = torch.Generator(self.device).manual_seed(seed)
        self.models = []
        for depth in self.depths:
            with torch.device(self.device):
                made = AutoModelForCausalLM.from_config(
                    model_config(scale, model, depth), dtype=DTYPES[scale.dtype]
                ).eval()
            draw_weights(made, num_layers, generator)
            self.models.append(made)
        self.implementation: str | None = None
        self.unavailable: dict[str, str] = {}

    @torch.no_grad()
    def prepare(self, cell: Cell) -> dict[str, Any]:
        """Compile both depths for `cell`; at the first cell, the deeper one with every experts implementation."""
        started = time.perf_counter()
        self.cell = cell
        torch.compiler.reset()
        shallow, deep = self.models
        if self.implementation is None:
            deep_step = self._fastest_step()
        else:
            deep_step = self._step(deep)
        assert self.implementation is not None
        shallow.set_experts_implementation(self.implementation)
        self.steps = [self._step(shallow), deep_step]
        return {
            "prepare_seconds": time.perf_counter() - started,
            "cudagraph_skips": cudagraph_skips(),
            "experts_implementation": self.implementation,
            "attention_implementation": self.models[0].config._attn_implementation,
            "unavailable": self.unavailable,
            "depths": list(self.depths),
            "num_layers": self.num_layers,
            "is_extrapolated": self.num_layers != self.depths[1],
        }

    @torch.no_grad()
    def sample(self) -> dict[str, float]:
        """Seconds of a step at both depths, in immediate sequence, and extrapolated to the whole model."""
        shallow, deep = (step.seconds() for step in self.steps)
        return {"shallow": shallow, "deep": deep, "seconds": extrapolate(shallow, deep, self.depths, self.num_layers)}

    def cost(self, bandwidth: float) -> dict[str, float]:
        """Bytes read by a whole-model step with bfloat16 experts, assuming independent uniform routing."""
        spec = spec_from_config(model_config(self.scale, self.model))
        spec = replace(spec, layers=spec.layers[: self.num_layers])
        plan = build_plan(spec, WeightFormats(), num_programs=1, max_context=self.scale.cell_length(self.cell.context))
        gpu = Gpu(str(self.device), 1, bandwidth, float("inf"), 0.0)
        return {"read_bytes": step_cost(plan, gpu, self.cell.rows, 1, self.cell.context).memory_bytes}

    def _step(self, model: Any) -> "Step":
        step = Step(self.scale, model, self.cell)
        step.run(WARM_STEPS)
        return step

    def _fastest_step(self) -> "Step":
        """The deeper model's fastest compiled step; the shallow one may have no experts."""
        steps: dict[str, Step] = {}
        seconds: dict[str, float] = {}
        deep = self.models[1]
        for name in EXPERTS_IMPLEMENTATIONS if self.scale.compiles_peer else EXPERTS_IMPLEMENTATIONS[:1]:
            try:
                deep.set_experts_implementation(name)
                steps[name] = self._step(deep)
                seconds[name] = min(steps[name].seconds() for _ in range(3))
            except PEER_ERRORS as error:
                self.unavailable[name] = one_line(error)
        if not seconds:
            raise RuntimeError(f"no implementation of experts runs compiled: {self.unavailable}")
        fastest = self.implementation = min(seconds, key=lambda name: seconds[name])
        # Compiled code depends on this setting, and is found again with it.
        deep.set_experts_implementation(fastest)
        return steps[fastest]


class Step:
    """A compiled decode step of one model over a filled cache. The device picks the newest token, as in ours."""

    def __init__(self, scale: Scale, model: Any, cell: Cell) -> None:
        from transformers import StaticCache

        self.device, self.cell = torch.device(scale.device), cell
        self.num_steps = SAMPLE_STEPS if not scale.is_tiny else 1
        length = cell.context + max(self.num_steps, WARM_STEPS) * cell.rows
        # Any: layer types differ between transformers releases.
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length)
        self.ids_1R = torch.arange(cell.rows, device=self.device)[None] % model.config.vocab_size
        self.positions_1R = torch.arange(cell.context - cell.rows, cell.context, device=self.device)[None]

        def decode(ids_1R: torch.Tensor, positions_1R: torch.Tensor) -> torch.Tensor:
            out = model(input_ids=ids_1R, position_ids=positions_1R, past_key_values=self.cache, use_cache=True)
            return out.logits.argmax(-1)

        decode(self.ids_1R, self.positions_1R)  # makes the cache's tensors
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.decode: Callable[..., torch.Tensor] = decode
        if scale.compiles_peer:
            self.decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
        self._rewind(whole=True)

    def _rewind(self, whole: bool) -> None:
        """Reset the cache's length to the context. Not whole: only the host's state, without a launch."""
        length = self.cell.context - self.cell.rows
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length_int"):
                # A full window rolls by itself; a filling one would need its device counter reset every step.
                assert length >= layer.max_cache_len, "contexts are longer than windows"
                layer.cumulative_length_int = length
            if whole:
                layer.cumulative_length.fill_(min(length, layer.max_cache_len))

    def run(self, num_steps: int) -> None:
        """Run `num_steps` steps from the context on."""
        self._rewind(whole=True)
        for _ in range(num_steps):
            torch.compiler.cudagraph_mark_step_begin()
            self._rewind(whole=False)
            self.decode(self.ids_1R, self.positions_1R)

    def seconds(self) -> float:
        """Seconds of one step, over enough steps that the first one's start hardly matters."""
        self.run(1)
        return device_seconds(lambda: self.run(self.num_steps), self.device) / self.num_steps


def cudagraph_skips() -> int:
    """How often torch.compile has skipped a CUDA graph in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def extrapolate(shallow: float, deep: float, depths: tuple[int, int], num_layers: int) -> float:
    """The time of `num_layers` layers, from the times of two depths."""
    return shallow + (num_layers - depths[0]) * (deep - shallow) / (depths[1] - depths[0])

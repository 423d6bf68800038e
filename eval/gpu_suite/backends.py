"""Our backends as contestants: random weights at a model's shapes, steps timed on the device, phases timed apart."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from speedstack.eval.gpu_suite.scale import Cell, Scale
from speedstack.eval.speed.device_timing import device_seconds, phase_kinds, replayer
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.engine import Engine
from speedstack.runtime.model.device import DTYPES
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.moe import route
from speedstack.runtime.model.released_models import released_config, tiny_config
from speedstack.runtime.model.spec import ModelSpec, MoeSpec
from speedstack.runtime.model.synthetic_weights import random_weights
from speedstack.runtime.model.weights import MoeWeights
from speedstack.runtime.perf.cost import PhaseCost, StepCost, active_experts, step_cost
from speedstack.runtime.perf.gpus import GPUS, Gpu

if TYPE_CHECKING:
    pass

NUM_GENERATED = 64
PHASE_REPEATS = 9


def model_config(scale: Scale, model: str, num_layers: int | None = None) -> Any:
    """The measured configuration of a model."""
    return (tiny_config if scale.is_tiny else released_config)(model, num_layers)


class BackendContestant:
    """One backend with a model's first `num_layers` layers. Made in a worker."""

    def __init__(self, scale: Scale, model: str, backend: str, num_layers: int, seed: int) -> None:
        self.scale, self.backend_name, self.seed = scale, backend, seed
        self.device = torch.device(scale.device)
        spec = spec_from_config(model_config(scale, model))
        self.spec: ModelSpec = replace(spec, layers=spec.layers[:num_layers])
        self.weights = random_weights(self.spec, DTYPES[scale.dtype], self.device, is_packed=True, seed=seed)
        self.engine: Engine | None = None
        self.backend: Any = None

    def load(self) -> int:
        """Wait until all weights are on the device; returns their bytes."""
        self._wait()
        return sum(self.weights.nbytes_by_part().values())

    def prepare(self, cell: Cell) -> dict[str, Any]:
        """Warm up a step of `cell` with random keys and values; `num_compiled` counts kernels not compiled ahead."""
        from speedstack.runtime.backends.gpu.kernels.aot_compile import compilations

        started = time.perf_counter()
        with compilations() as compiled:
            self._warm(cell)
        return {"prepare_seconds": time.perf_counter() - started, "num_compiled": len(compiled)}

    def _warm(self, cell: Cell) -> None:
        self.cell, self.engine, self.backend = cell, None, None  # free the old buffers first
        self.engine = Engine(
            self.weights,
            backend=self.backend_name,
            max_length=self.scale.cell_length(cell.context),
            max_batch_size=1,
        )
        self.backend = self.engine.backend
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        for cache in self.backend.memory.caches:
            cache.normal_(0.0, 1.0, generator=generator)
        tokens = torch.Generator().manual_seed(self.seed + 2)
        ids = torch.randint(0, self.spec.vocab_size, (cell.rows,), generator=tokens).tolist()
        positions = list(range(cell.context - cell.rows, cell.context))
        self.rows = Rows(ids, [0] * cell.rows, positions)
        logits_WV, _ = self.backend.step(self.rows, [cell.rows - 1])
        if not bool(torch.isfinite(logits_WV).all()):
            raise RuntimeError("the logits of a step are not finite")
        self.backend.repeat(self.scale.warm_steps)
        self._wait()

    def sample(self) -> float:
        """Seconds of one step, from many in a row without the host between them."""
        self.backend.repeat(self.scale.warm_steps)
        num_steps = self.scale.num_steps
        return device_seconds(lambda: self.backend.repeat(num_steps), self.device) / num_steps

    def generation(self) -> dict[str, float]:
        """Tokens/s of `Engine.generate` for one sequence after this cell's context, host included."""
        assert self.engine is not None
        num_new = NUM_GENERATED if not self.scale.is_tiny else 2
        generator = torch.Generator().manual_seed(self.seed + 3)
        ids = torch.randint(0, self.spec.vocab_size, (self.cell.context,), generator=generator).tolist()
        stats = self.engine.generate(ids, max_new_tokens=num_new, ignore_eos=True).stats
        return {
            "decode_tokens_per_second": stats.num_round_tokens / stats.decode_seconds,
            "prefill_seconds": stats.prefill_seconds,
        }

    def cost(self, bandwidth: float) -> dict[str, Any]:
        """Bytes a step reads according to the plan, its roofline, and the prediction at a measured bandwidth.

        Router choices are counted if the backend can stop after a phase, else expected.
        """
        found = self._cost(bandwidth)
        counted = self.count_experts() if isinstance(self.backend, GraphBackend) else {}
        num_bytes = found.memory_bytes
        expected = 0.0
        for phase in self.backend.plan.phases:
            if phase.work.num_experts and phase.layer in counted:
                share = active_experts(phase.work.num_experts, phase.work.top_k, self.cell.rows)
                num_bytes += (counted[phase.layer] - share) * phase.work.expert_bytes
                expected += share if phase.op == "expert_gate_up" else 0.0
        layers = max(1, len(counted))
        return {
            "read_bytes": num_bytes,
            "expected_read_bytes": found.memory_bytes,
            "active_experts_a_layer": sum(counted.values()) / layers if counted else None,
            "expected_active_experts_a_layer": expected / layers if counted else None,
            "roofline_seconds": found.roofline_seconds,
            "predicted_seconds": found.predicted_seconds,
        }

    def _cost(self, bandwidth: float) -> StepCost:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        known = next((gpu for gpu in GPUS.values() if gpu.name in name.upper().replace(" ", "")), None)
        plan = self.backend.plan
        # A GPU of unknown peak is charged for bytes alone.
        flops = known.bf16_flops if known is not None else float("inf")
        gpu = Gpu(name, plan.num_programs, bandwidth, flops, 0.0)
        return step_cost(plan, gpu, self.cell.rows, 1, self.cell.context)

    def count_experts(self) -> dict[int, int]:
        """Number of distinct experts chosen by the newest step's rows, by layer with experts."""
        counts: dict[int, int] = {}
        for index, launch in enumerate(self.backend.launches):
            launch.run(is_dependent=self.device.type == "cuda" and index > 0)
            layer = launch.phase.layer
            if launch.phase.op != "router" or layer is None:
                continue
            moe, weights = self.spec.layers[layer].mlp, self.weights.layers[layer].mlp
            assert isinstance(moe, MoeSpec) and isinstance(weights, MoeWeights)
            capacity = self.backend.plan.rows
            logits_ER = self.backend.memory.buffers["router"][: moe.num_experts * capacity].view(-1, capacity)
            experts_RK, _ = route(logits_ER.T[: self.cell.rows], weights.correction_bias_E, moe)
            counts[layer] = len(experts_RK.unique())
        return counts

    def phases(self, bandwidth: float) -> list[dict[str, Any]]:
        """Measured and predicted time of every kind of phase, in layer order. Graph backend only.

        Phases of a kind run in sequence on their own layers' weights, which so come from memory as in a step; the L2
        cache is overwritten before every timing.
        """
        costs = {phase.name: phase for phase in self._cost(bandwidth).phases}
        flush = torch.empty(self.scale.flush_bytes, dtype=torch.uint8, device=self.device)
        rows = []
        for name, launches in phase_kinds(self.backend.launches, self.spec):
            run = replayer(launches, self.device)
            samples = []
            for _ in range(PHASE_REPEATS if not self.scale.is_tiny else 1):
                flush.zero_()
                samples.append(device_seconds(run, self.device))
            mine: list[PhaseCost] = [costs[launch.phase.name] for launch in launches]
            rows.append(
                {
                    "phase": name,
                    "num_phases": len(launches),
                    "seconds": sorted(samples)[len(samples) // 2],
                    "predicted_seconds": sum(cost.predicted_seconds for cost in mine),
                    "roofline_seconds": sum(cost.roofline_seconds for cost in mine),
                    "read_bytes": sum(cost.memory_bytes for cost in mine),
                }
            )
        return rows

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

"""The graph backend: the plan's phases as Triton kernels, one after another, replayed as one CUDA graph.

The baseline for a persistent kernel, and its device functions' proving ground: what a phase computes is the same code.
A step holds up to `phases.MAX_ROWS` rows; the engine's larger ones are cut. Kernels begin while the one before them
ends (programmatic dependent launch). Without a GPU the kernels run under Triton's interpreter, in float32, which is
slow and meant for tests: TRITON_INTERPRET=1 has to be set before the process starts.

Left out: draft trees, whose siblings would share a place in the key/value buffers; top-k and top-p, which the engine
does from the logits.

Legend: R rows, D hidden, C features, W wanted rows, V vocabulary.
"""

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.tree import Draft
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backend import DraftRequest, Rows
from speedstack.runtime.budget import compiled_cost
from speedstack.runtime.formats import WeightFormat, WeightFormats
from speedstack.runtime.module_drafter import ModuleDrafter
from speedstack.runtime.phases import MAX_ROWS, SPLIT_SIZE, build_plan
from speedstack.runtime.weights import ModelWeights, MoeWeights

# Under the interpreter the programs of a grid take turns; a few make every phase have more than one item.
INTERPRETED_PROGRAMS = 4


def check_supported(weights: ModelWeights) -> bool:
    """Whether kernels are interpreted. Raises ValueError, with the reason, where they can neither run nor be."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'graph' needs Triton, which is not installed: pip install triton")
    import triton

    from speedstack.runtime.kernels.triton import launch

    is_interpreted = not isinstance(launch.embed_kernel, triton.JITFunction)
    device, dtype = weights.embedding_VD.device, weights.embedding_VD.dtype
    if device.type != "cuda" and not is_interpreted:
        raise ValueError(
            "backend 'graph' runs on a GPU; on a CPU it needs Triton's interpreter, for tests: set TRITON_INTERPRET=1"
        )
    if is_interpreted and dtype != torch.float32:
        raise ValueError("backend 'graph' takes float32 only under Triton's interpreter: it computes others wrongly")
    if not is_interpreted and dtype != torch.bfloat16:
        raise ValueError("backend 'graph' takes bfloat16 only on a GPU; use backend='reference' for float32")
    return is_interpreted


class GraphBackend:
    """See the module. num_rows: of a step; split_size: positions that one item of attention takes; powers of two."""

    name = "graph"
    no_trees_because: str | None = "its kernels write keys and values at a row's position, which siblings would share"
    round_cost = compiled_cost()  # not measured on a GPU

    def __init__(
        self,
        weights: ModelWeights,
        drafter: DFlashDraftModel | None,
        num_slots: int,
        max_length: int,
        num_rows: int = MAX_ROWS,
        split_size: int = SPLIT_SIZE,
    ) -> None:
        assert num_rows & (num_rows - 1) == 0, "tiles are powers of two"
        self._is_interpreted = check_supported(weights)
        from speedstack.runtime.launches import Memory, build_launches

        started = time.perf_counter()
        self.weights, self.num_slots, self.max_length = weights, num_slots, max_length
        self.device = weights.embedding_VD.device
        num_programs = INTERPRETED_PROGRAMS
        if not self._is_interpreted:
            num_programs = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.plan = build_plan(
            weights.spec, formats_of(weights), num_programs, num_rows, max_length, split_size=split_size
        )
        self.memory = Memory(self.plan, weights, num_slots, max_length)
        self.launches = build_launches(self.plan, weights, self.memory)
        self._last_phases = {
            launch.phase.layer: index for index, launch in enumerate(self.launches) if launch.phase.layer is not None
        }
        self._graph: Any = None
        self.drafter: ModuleDrafter | None = None
        self.set_drafter(drafter)
        self.prepare_seconds = time.perf_counter() - started

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        w = self.weights
        self.drafter, self._taps, self._graph = None, dict[int, torch.Tensor](), None
        if drafter is not None:
            self.drafter = ModuleDrafter(drafter, w.embedding_VD, w.lm_head_VD, self.num_slots, self.max_length)
            ids = drafter.config.target_layer_ids
            self._features_RC = w.embedding_VD.new_zeros(self.plan.rows, len(ids) * w.spec.hidden_size)
            for tap, layer in zip(self._features_RC.chunk(len(ids), dim=-1), ids, strict=True):
                self._taps[self._last_phases[layer]] = tap

    def weight_bytes(self) -> dict[str, int]:
        drafter = {"drafter": self.drafter.weight_bytes()} if self.drafter is not None else {}
        return self.weights.nbytes_by_part() | drafter

    def cache_bytes(self) -> int:
        drafter = self.drafter.cache_bytes() if self.drafter is not None else 0
        return sum(cache.nbytes for cache in self.memory.caches) + drafter

    @torch.no_grad()
    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        assert rows.parents is None, "the engine asks for no trees here"
        assert all(a < b for a, b in pairwise(logit_rows)), "logit rows have to ascend"
        # Kernels are launched on the current device, which need not be the weights'.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            return self._step(rows, logit_rows)

    def _step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        parts, best = [], list[int]()
        for start in range(0, len(rows.tokens), self.plan.rows):
            cut = slice(start, start + self.plan.rows)
            self._step_chunk(Rows(rows.tokens[cut], rows.slots[cut], rows.positions[cut]))
            here = [row - start for row in logit_rows if start <= row < start + self.plan.rows]
            if here:
                parts.append(self.memory.logits_VR[:, here].T.contiguous())
                best += self.memory.tokens[here].tolist()
        return torch.cat(parts) if parts else self.memory.logits_VR.new_empty(0, self.weights.spec.vocab_size), best

    def _step_chunk(self, rows: Rows) -> None:
        from speedstack.runtime.launches import row_records

        if self._graph is None and not self._is_interpreted:
            self._graph = self._capture()
        self.memory.rows.copy_(row_records(rows, self.plan.rows))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._launch_all(is_dependent=False)
        if self.drafter is not None:
            self.drafter.write(self._features_RC[: len(rows.tokens)], rows.slots, rows.positions)

    def repeat(self, num_steps: int) -> None:
        """Computes the newest step again, so many times, and waits for none: what the device needs for a step."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            for _ in range(num_steps):
                if self._graph is not None:
                    self._graph.replay()
                else:
                    self._launch_all(is_dependent=False)

    def _launch_all(self, is_dependent: bool) -> None:
        for index, launch in enumerate(self.launches):
            # The first kernel of a step follows the copy of its rows, which lets nothing begin early.
            launch.run(is_dependent and index > 0)
            if index in self._taps:
                self._taps[index].copy_(self.memory.hidden_DR.T)

    def _capture(self) -> "torch.cuda.CUDAGraph":
        # Idle rows: kernels are compiled and run once, and write nothing that a row reads.
        self.memory.rows.copy_(row_records_of_none(self.plan.rows))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch_all(is_dependent=True)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self._launch_all(is_dependent=True)
        return graph

    def commit(self, rows: Sequence[int]) -> None:
        raise AssertionError("the engine asks for no trees here")

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int, tree_budget: int | None = None) -> list[Draft]:
        assert tree_budget is None, "the engine asks for no trees here"
        assert self.drafter is not None
        return self.drafter.draft(requests, num_drafts)


def row_records_of_none(capacity: int) -> torch.Tensor:
    """The records of a step without rows."""
    from speedstack.runtime.launches import row_records

    return row_records(Rows([], [], []), capacity)


def formats_of(weights: ModelWeights) -> WeightFormats:
    """What the plan's cost is counted by."""
    plain: WeightFormat = "float32" if weights.embedding_VD.dtype == torch.float32 else "bf16"
    layers = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, MoeWeights)]
    is_packed = any(isinstance(mlp.gate_up_EID, MXFP4Tensor) for mlp in layers)
    return WeightFormats(plain, plain, plain, "float32", "mxfp4" if is_packed else plain, plain, plain)

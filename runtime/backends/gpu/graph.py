"""The graph backend: the plan's phases as Triton kernels, replayed as one CUDA graph.

It is the resident kernel's baseline and runs the same device functions. Each kernel starts while the previous one ends
(programmatic dependent launch).
"""

from typing import Any

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.base import PlanBackend, Target, check_supported
from speedstack.runtime.backends.gpu.buffers import row_records
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.step import MAX_ROWS, SPLIT_SIZE

# Interpreted programs of a grid run in turn; with few, every phase has programs with several items.
INTERPRETED_PROGRAMS = 4


class GraphBackend(PlanBackend):
    """num_rows, split_size, target: see `PlanBackend`."""

    name = "graph"

    def __init__(
        self,
        weights: ModelWeights,
        drafter: DFlashDraftModel | None,
        num_slots: int,
        max_length: int,
        num_rows: int = MAX_ROWS,
        split_size: int = SPLIT_SIZE,
        target: Target | None = None,
    ) -> None:
        self._is_interpreted = check_supported(self.name, weights, target)
        num_programs = INTERPRETED_PROGRAMS
        if target is not None:
            num_programs = target.num_sms
        elif not self._is_interpreted:
            device = weights.embedding_VD.device
            num_programs = torch.cuda.get_device_properties(device).multi_processor_count
        super().__init__(weights, drafter, num_slots, max_length, num_rows, split_size, num_programs, target=target)

    def _prepare(self) -> None:
        from speedstack.runtime.backends.gpu.op_launch import build_launches

        self.launches = build_launches(self.plan, self.weights, self.memory)
        self._graph: Any = None

    def _start(self) -> None:
        if self._is_interpreted:
            self._launch_all(is_dependent=False)
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def compile(self, is_dependent: bool = True) -> list[Any]:
        """See `PlanBackend`. is_dependent: kernels may start before the previous one ends."""
        from speedstack.runtime.backends.gpu.kernels.aot_compile import compile_kernel
        from speedstack.runtime.backends.gpu.kernels.single_op import phase_kernel

        assert self.target is not None
        first, built = self.launches[0], []
        for launch in {each.binding.constants: each for each in reversed(self.launches)}.values():
            depends = is_dependent and launch is not first
            arguments, options = launch.arguments(depends), launch.options(depends)
            built.append(compile_kernel(phase_kernel, arguments, options, self.target.capability))
        return built

    def _launch_all(self, is_dependent: bool) -> None:
        for index, launch in enumerate(self.launches):
            # The first kernel follows the copy of the rows, which cannot overlap.
            launch.run(is_dependent and index > 0)

    def _capture(self) -> "torch.cuda.CUDAGraph":
        # Without rows, so that compiling and running once writes nothing that a row reads.
        rows = self.memory.rows.clone()
        self.memory.rows.copy_(row_records(Rows([], [], []), self.plan.rows))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch_all(is_dependent=True)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self._launch_all(is_dependent=True)
        self.memory.rows.copy_(rows)
        return graph

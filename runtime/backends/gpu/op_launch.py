"""Kernels of the `graph` backend, one per phase: grid, arguments, compile options."""

from dataclasses import dataclass
from typing import Any

import triton

from speedstack.runtime.backends.gpu.bindings.layers import Binding, bind
from speedstack.runtime.backends.gpu.buffers import Memory
from speedstack.runtime.backends.gpu.interpreter import interpret_grid
from speedstack.runtime.backends.gpu.kernels.ptxas_workaround import first_values
from speedstack.runtime.backends.gpu.kernels.single_op import phase_kernel
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Phase, Plan

# Phases with eight warps: products have a slice per warp, attention needs the registers.
_WIDE = "qkv attention o_proj dense_gate_up dense_down router expert_gate_up expert_down lm_head"
NUM_WARPS = dict.fromkeys(_WIDE.split(), 8)
DEFAULT_NUM_WARPS = 4


@dataclass(frozen=True)
class Launch:
    """One launch of a phase."""

    binding: Binding

    @property
    def phase(self) -> Phase:
        return self.binding.phase

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.phase.axes)

    def run(self, is_dependent: bool) -> None:
        """is_dependent: may start before the previous kernel ends."""
        if isinstance(phase_kernel, triton.JITFunction):
            with first_values():
                phase_kernel[self.grid](**self.arguments(is_dependent), **self.options(is_dependent))
        else:
            interpret_grid(phase_kernel, self.grid, self.arguments(is_dependent))

    def arguments(self, is_dependent: bool) -> dict[str, Any]:
        """Kernel arguments by parameter name."""
        return {"pointers": self.binding.pointers, "PHASE": self.binding.constants, "IS_DEPENDENT": is_dependent}

    def options(self, is_dependent: bool) -> dict[str, Any]:
        """Compile and launch options."""
        options = {"num_warps": NUM_WARPS.get(self.phase.op, DEFAULT_NUM_WARPS), "enable_fp_fusion": True}
        return options | ({"launch_pdl": True} if is_dependent else {})


def build_launches(plan: Plan, weights: ModelWeights, memory: Memory) -> list[Launch]:
    """A step's kernels in order."""
    return [Launch(binding) for binding in bind(plan, weights, memory)]

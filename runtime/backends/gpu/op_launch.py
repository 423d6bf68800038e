"""The kernels of the `graph` backend, one a phase: grid, arguments, and how they are compiled."""

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

# Warps of a program: of a product each of eight has a slice, and attention holds most in registers.
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
        """is_dependent: may begin while the kernel before it ends."""
        if isinstance(phase_kernel, triton.JITFunction):
            with first_values():
                phase_kernel[self.grid](**self.arguments(is_dependent), **self.options(is_dependent))
        else:
            interpret_grid(phase_kernel, self.grid, self.arguments(is_dependent))

    def arguments(self, is_dependent: bool) -> dict[str, Any]:
        """The kernel's, by its parameters."""
        return {"pointers": self.binding.pointers, "PHASE": self.binding.constants, "IS_DEPENDENT": is_dependent}

    def options(self, is_dependent: bool) -> dict[str, Any]:
        """How the kernel is compiled and launched."""
        options = {"num_warps": NUM_WARPS.get(self.phase.op, DEFAULT_NUM_WARPS), "enable_fp_fusion": True}
        return options | ({"launch_pdl": True} if is_dependent else {})


def build_launches(plan: Plan, weights: ModelWeights, memory: Memory) -> list[Launch]:
    """The kernels of a step in order."""
    return [Launch(binding) for binding in bind(plan, weights, memory)]

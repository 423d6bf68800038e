"""The common part of all bindings: the plan, its buffers, and the rotary tables."""

from abc import ABC, abstractmethod

import torch

from speedstack.runtime.backends.gpu.buffers import Memory
from speedstack.runtime.model.rope import rotary_tables
from speedstack.runtime.model.spec import AttentionSpec
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Phase, Plan


class StepBinder(ABC):
    """Finds buffers by name; the next norm depends on the phase's stack."""

    def __init__(self, plan: Plan, weights: ModelWeights, memory: Memory) -> None:
        self.plan, self.weights, self.memory = plan, weights, memory
        self.spec, self.buffers = weights.spec, memory.buffers
        self._tables: dict[AttentionSpec, tuple[torch.Tensor, torch.Tensor]] = {}

    @abstractmethod
    def for_norm(self, phase: Phase) -> tuple[torch.Tensor, ...]:
        """The next norm's weight, and the buffers for its inputs."""

    def buffer(self, *names: str) -> tuple[torch.Tensor, ...]:
        return tuple(self.buffers[name] for name in names)

    def optional(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """The tensor, or a placeholder for None."""
        return self.memory.hidden_DR if tensor is None else tensor

    def tables(self, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions."""
        if spec not in self._tables:
            cos_TH, sin_TH = rotary_tables(spec, self.plan.max_context, self.memory.hidden_DR.device)
            dtype = self.memory.hidden_DR.dtype
            self._tables[spec] = cos_TH.to(dtype).contiguous(), sin_TH.to(dtype).contiguous()
        return self._tables[spec]

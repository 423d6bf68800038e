"""Arguments of the device functions `draft`, `logit_histogram`, `sample` and `accept` (`plan/ops/multi_step.py`)."""

from collections.abc import Callable
from typing import Any

import torch

from speedstack.runtime.backends.gpu.buffers import Memory
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.plan.ir import Phase, Plan
from speedstack.runtime.plan.tiling import power_of_two

# Do not affect results: tokens that top-k and top-p process at a time, and text tokens compared at a time.
CANDIDATES = 512
TEXT_BLOCK = 4096

Bound = tuple[tuple[torch.Tensor, ...], dict[str, Any]]


class MultiStepBinder:
    """Binds the phases of `plan/ops/multi_step.py`."""

    def __init__(self, plan: Plan, spec: ModelSpec, memory: Memory) -> None:
        self.plan, self.spec, self.memory = plan, spec, memory
        self.bound: dict[str, Callable[[Phase], Bound]] = {
            "draft": self.draft,
            "logit_histogram": self.logit_histogram,
            "sample": self.sample,
            "accept": self.accept,
        }

    def buffer(self, *names: str) -> tuple[torch.Tensor, ...]:
        return tuple(self.memory.buffers[name] for name in names)

    def draft(self, phase: Phase) -> Bound:
        history, stride = self.history()
        constants = {"STRIDE": stride, "BLOCK": TEXT_BLOCK}
        return (self.memory.sequences, history, *self.buffer("proposals")), constants

    def logit_histogram(self, phase: Phase) -> Bound:
        pointers = (self.memory.rows, self.memory.sampling, *self.buffer("logits", "peaks", "bins", "chains"))
        return pointers, self.sizes()

    def sample(self, phase: Phase) -> Bound:
        results = self.buffer("logits", "best", "peaks", "bins", "chains", "notes")
        logit_histogram, head = (
            self.plan.phases[self.plan.phase_named[name]] for name in ("logit_histogram", "lm_head")
        )
        constants = {
            "SP": power_of_two(logit_histogram.axes[1].size),
            "TILE": head.tile,
            "REPORT": self.memory.reports.shape[1],
        }
        return (self.memory.rows, self.memory.sampling, *results, self.memory.reports), self.sizes() | constants

    def sizes(self) -> dict[str, int]:
        """How a row's logits are cut into LM-head tiles and `logit_histogram` slices."""
        logit_histogram = self.plan.phases[self.plan.phase_named["logit_histogram"]]
        return {
            "VOCAB": self.spec.vocab_size,
            "TILES": self.plan.buffer_named["peaks"].num_cells,
            "SLICE": logit_histogram.tile,
            "SLICES": logit_histogram.axes[1].size,
            "C": CANDIDATES,
        }

    def accept(self, phase: Phase) -> Bound:
        history, stride = self.history()
        proposals = self.memory.buffers.get("proposals")
        eos = self.spec.eos_token_ids
        # -2 is neither a token nor a marker.
        padded = [*eos, *[-2] * (power_of_two(max(1, len(eos))) - len(eos))]
        eos_L = torch.tensor(padded, dtype=torch.int32, device=self.memory.rows.device)
        pointers = (self.memory.rows, self.memory.sequences, self.memory.reports, eos_L, history)
        return (*pointers, self.memory.rows if proposals is None else proposals), {
            "LP": len(padded),
            "STRIDE": stride,
            "HAS_HISTORY": stride > 0,
            "HAS_PROPOSALS": proposals is not None,
            "REPORT": self.memory.reports.shape[1],
        }

    def history(self) -> tuple[torch.Tensor, int]:
        """Texts of all slots and their stride in tokens; stride 0 if nobody reads them."""
        history = self.memory.buffers.get("history")
        return (self.memory.rows, 0) if history is None else (history, history.shape[1])

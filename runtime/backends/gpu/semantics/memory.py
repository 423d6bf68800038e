"""Buffers shared by the phases of a step's layers, and access to them."""

from abc import abstractmethod

import torch
import torch.nn.functional as F

from speedstack.runtime.backends.gpu.semantics.multi_step import MultiStepSemantics
from speedstack.runtime.model.spec import AttentionSpec
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Phase, Plan
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS


class LayerBuffers(MultiStepSemantics):
    """Hidden states of R rows, and the inputs of the next norm. Layouts: `layers.py`."""

    def __init__(self, plan: Plan, weights: ModelWeights, num_slots: int | None) -> None:
        super().__init__(plan, weights.spec.vocab_size, weights.spec.eos_token_ids, num_slots)
        # Unpacked once: items take columns, and unpacking a matrix for each would dominate.
        self.weights, self.spec = weights.plain(), weights.spec
        like, R = weights.embedding_VD, plan.rows
        self.hidden_RD = like.new_full((R, self.spec.hidden_size), float("nan"))
        names = [name for name in plan.buffer_named if name.startswith("features.")]
        self.scaled_RD = like.new_full((R, plan.buffer_named["scaled"].num_cells), float("nan"))
        self.squares_RB = torch.full((R, plan.buffer_named["squares"].num_cells), float("nan"))
        self.features = {name: torch.full_like(self.scaled_RD, float("nan")) for name in names}
        self.shared: dict[str, torch.Tensor] = {}
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.layer_specs, self.layer_weights = [*self.spec.layers], [*self.weights.layers]
        self.tables: dict[AttentionSpec, tuple[torch.Tensor, torch.Tensor]] = {}

    @abstractmethod
    def eps(self, phase: Phase) -> float:
        """The epsilon of the norm before a phase."""

    @abstractmethod
    def norm_behind(self, phase: Phase) -> torch.Tensor:
        """The weight of the norm after a phase that writes the hidden state."""

    def columns(self, phase: Phase, index: tuple[int, ...], width: int) -> slice:
        return slice(index[-1] * phase.tile, min((index[-1] + 1) * phase.tile, width))

    def norm(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        """The scaled hidden state, and the factor for a product's result, float32 [R, 1]."""
        mean_R1 = self.squares_RB.sum(-1, keepdim=True) / self.spec.hidden_size
        return self.scaled_RD[:, : self.spec.hidden_size].clone(), torch.rsqrt(mean_R1 + self.eps(phase))

    def write_hidden(self, phase: Phase, rows: int | slice, columns: slice, hidden: torch.Tensor) -> None:
        """Writes rows or columns of the hidden state, the next norm's inputs, and the drafter's copy."""
        hidden = hidden.to(self.hidden_RD.dtype)
        self.hidden_RD[rows, columns] = hidden
        self.write_for_norm(self.scaled_RD, self.squares_RB, rows, columns, hidden, self.norm_behind(phase))
        for region in phase.writes:
            if region.buffer.startswith("features."):
                self.features[region.buffer][rows, columns] = hidden

    def write_for_norm(
        self,
        scaled_RD: torch.Tensor,
        squares_RB: torch.Tensor,
        rows: int | slice,
        columns: slice,
        values: torch.Tensor,
        norm_D: torch.Tensor,
    ) -> None:
        """Writes a norm's inputs for these rows or columns; columns are whole blocks."""
        scaled_RD[:, : self.spec.hidden_size][rows, columns] = values * norm_D[columns]
        padded = F.pad(values.float(), (0, -values.shape[-1] % BLOCK_COLUMNS))
        blocks = slice((columns.start or 0) // BLOCK_COLUMNS, None)
        squares = padded.unflatten(-1, (-1, BLOCK_COLUMNS)).square().sum(-1)
        squares_RB[rows, blocks][..., : squares.shape[-1]] = squares

"""The drafter as its PyTorch module, with a context per slot: every option, any device.

The reference backend uses it, and so does `cpu` if its kernels do not support the drafter's sizes.

Legend: R rows, C features, K block slots, D hidden, U draft vocabulary, V vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from speedstack.dflash.model import DFlashDraftModel, DraftContext
from speedstack.dflash.propose import Draft, propose
from speedstack.runtime.backends.base import DraftRequest
from speedstack.runtime.model.weights import Linear, plain_matrix
from speedstack.runtime.rounds.sampling import filter_logits


def draft_scores(logits_U: torch.Tensor, request: DraftRequest, depth: int, target_ids_U: torch.Tensor) -> torch.Tensor:
    """Scores whose argmax is the proposal at `depth`: the drafter's logits with the target's sampling applied."""
    if request.params.temperature == 0.0:
        return logits_U
    scores_U = filter_logits(logits_U, request.params)
    return scores_U if request.noise is None else scores_U + request.noise[depth][target_ids_U]


class ModuleDrafter:
    """A `DFlashDraftModel` and its contexts, in the dtype and on the device of the target's embedding.

    The head's rows it reads are dequantized if the head is FP8.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: DFlashDraftModel,
        embedding_VD: torch.Tensor,
        lm_head_VD: Linear,
        num_slots: int,
        max_length: int,
        contexts: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """contexts: existing keys and values of every slot (see `DraftContext`); None allocates them."""
        self.model, self._embedding_VD = model, embedding_VD
        self._head_UD = model.draft_head(plain_matrix(lm_head_VD, embedding_VD.dtype))
        self._has_own_head = self._head_UD is not lm_head_VD
        ids_U = torch.arange(model.config.num_draft_tokens, device=embedding_VD.device)
        self._target_ids_U = model.target_ids(ids_U)
        self.contexts = [
            DraftContext(model, max_length, None if contexts is None else contexts[slot]) for slot in range(num_slots)
        ]

    def weight_bytes(self) -> int:
        """Bytes of the module and of copied head rows (pruned vocabulary or FP8 head)."""
        return sum(p.nbytes for p in self.model.parameters()) + self._has_own_head * self._head_UD.nbytes

    def cache_bytes(self) -> int:
        """Bytes of all contexts."""
        return sum(context.keys_LTGH.nbytes + context.values_LTGH.nbytes for context in self.contexts)

    @torch.no_grad()
    def write(self, features_RC: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Adds rows' features to their slots' contexts; rows of a slot have consecutive positions."""
        for slot, rows in groupby(range(len(slots)), key=lambda row: slots[row]):
            run = list(rows)
            self.contexts[slot].write(self.model, features_RC[run[0] : run[-1] + 1], positions[run[0]])

    @torch.no_grad()
    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        """See `Backend.draft`."""
        return [self._draft(request, num_drafts) for request in requests]

    def _draft(self, request: DraftRequest, num_drafts: int) -> Draft:
        config, device = self.model.config, self._embedding_VD.device
        num_masks = num_drafts - config.sample_from_anchor
        ids_K = torch.tensor([request.anchor, *[config.mask_token_id] * num_masks], device=device)
        embeds_KD = self.model.embed_block(ids_K, self._embedding_VD)
        hidden_KD = self.contexts[request.slot].draft_hidden(self.model, embeds_KD, request.position)
        return propose(
            self.model,
            hidden_KD,
            self._head_UD,
            request.anchor,
            lambda logits_U, depth: draft_scores(logits_U, request, depth, self._target_ids_U),
        )

"""Training blocks: anchors, inputs, labels and attention masks.

A block starts at an anchor position a of real text. Its inputs are the anchor's token and K - 1 masks, its labels the J
tokens after a, its context the positions below a: as in serving, the anchor's features are not computed yet. J is K -
1, or K if the anchor's slot proposes too. Many blocks of a window run in one pass, separated by the mask. A block
neither sees nor predicts across a document boundary.

Source: DFlash, section on random anchors; mask as in SpecForge, speculators and ModelOpt, which agree.

Shape suffixes: B windows, T positions, A blocks a window, K block size, J proposals, Q = A * K queries, S = T + Q keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from speedstack.dflash.attention import in_window
from speedstack.dflash.config import DFlashConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Blocks:
    """The drafter's training inputs and labels, int64 except the bool `valid_BAJ`.

    `labels_BAJ`: tokens at a + 1 .. a + J; `before_BAJ`: positions a .. a + J - 1; `previous_BAJ`: the tokens there.
    `valid_BAJ`: False past the window, in another document, where the caller excludes, and in filler blocks.
    """

    positions_BQ: Tensor
    input_ids_BQ: Tensor
    labels_BAJ: Tensor
    previous_BAJ: Tensor
    before_BAJ: Tensor
    valid_BAJ: Tensor


def document_ids(ids_BT: Tensor, separator_id: int) -> Tensor:
    """Document number of each position, int64 [B, T]; a separator is its document's last token."""
    is_separator = (ids_BT == separator_id).long()
    return is_separator.cumsum(1) - is_separator


def sample_anchors(
    documents_BT: Tensor, predictable_BT: Tensor, num_anchors: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws anchors uniformly without repetition.

    An anchor needs an earlier position in its document, and a next position that is in the document and predictable
    (`predictable_BT`, bool). Returns ascending anchors int64 [B, A] and real bool [B, A]; missing anchors are position
    0, not real. Drawn on the CPU, so a generator gives the same anchors on every device.
    """
    same_as_previous_BT = documents_BT[:, 1:] == documents_BT[:, :-1]
    possible_BT = torch.zeros_like(predictable_BT)
    possible_BT[:, 1:-1] = same_as_previous_BT[:, :-1] & same_as_previous_BT[:, 1:] & predictable_BT[:, 2:]
    noise_BT = torch.rand(possible_BT.shape, generator=generator).to(possible_BT.device)
    score_BA, anchors_BA = noise_BT.masked_fill(~possible_BT, -1.0).topk(min(num_anchors, noise_BT.shape[1]), dim=1)
    anchors_BA = anchors_BA.masked_fill(score_BA < 0, 0).sort(dim=1).values
    return anchors_BA, anchors_BA > 0


def make_blocks(
    ids_BT: Tensor,
    documents_BT: Tensor,
    predictable_BT: Tensor,
    anchors_BA: Tensor,
    real_BA: Tensor,
    block_size: int,
    mask_token_id: int,
    num_proposals: int | None = None,
) -> Blocks:
    """The blocks at `anchors_BA`, with `num_proposals` labels each; None is `block_size - 1`."""
    num_proposals = block_size - 1 if num_proposals is None else num_proposals
    length = ids_BT.shape[1]
    positions_BAK = anchors_BA[..., None] + torch.arange(block_size, device=ids_BT.device)
    text_BAT = anchors_BA[..., None] + torch.arange(num_proposals + 1, device=ids_BT.device)
    is_inside_BAT = text_BAT < length
    text_BAT = text_BAT.clamp(max=length - 1)

    def at(x_BT: Tensor) -> Tensor:
        return x_BT.gather(1, text_BAT.flatten(1)).view_as(text_BAT)

    ids_BAT, documents_BAT = at(ids_BT), at(documents_BT)
    valid_BAT = is_inside_BAT & (documents_BAT == documents_BAT[..., :1]) & at(predictable_BT) & real_BA[..., None]
    input_ids_BAK = torch.full_like(positions_BAK, mask_token_id)
    input_ids_BAK[..., 0] = ids_BAT[..., 0]
    return Blocks(
        positions_BQ=positions_BAK.flatten(1),
        input_ids_BQ=input_ids_BAK.flatten(1),
        labels_BAJ=ids_BAT[..., 1:],
        previous_BAJ=ids_BAT[..., :-1],
        before_BAJ=text_BAT[..., :-1],
        valid_BAJ=valid_BAT[..., 1:],
    )


@dataclass(frozen=True)
class _Layout:
    """Layout of keys and queries: T context keys, then blocks of `block_size`; optionally a sliding window."""

    length: int
    block_size: int
    window: int | None
    is_causal: bool

    def visible(
        self, query: Tensor, key: Tensor, key_document: Tensor, anchor: Tensor, anchor_document: Tensor
    ) -> Tensor:
        """Whether a block's query sees a key; elementwise, for both kinds of masks."""
        is_context = key < self.length
        in_context = (key < anchor) & (key_document == anchor_document)
        in_block = (key - self.length) // self.block_size == query // self.block_size
        seen = torch.where(is_context, in_context, in_block)
        if self.window is None:
            return seen
        position = anchor + query % self.block_size
        # Wrong for other blocks' keys, but those are not visible anyway.
        key_position = torch.where(is_context, key, anchor + (key - self.length) % self.block_size)
        return seen & in_window(position, key_position, self.window, self.is_causal)


def dense_mask(
    documents_BT: Tensor, anchors_BA: Tensor, block_size: int, window: int | None = None, is_causal: bool = True
) -> Tensor:
    """What each block query sees of T context keys followed by Q block keys, bool [B, 1, Q, S].

    `window`, `is_causal`: of a sliding-window layer, see `attention.in_window`.
    """
    length, num_queries = documents_BT.shape[1], anchors_BA.shape[1] * block_size
    device = documents_BT.device
    query_Q = torch.arange(num_queries, device=device)
    documents_BS = torch.nn.functional.pad(documents_BT, (0, num_queries), value=-1)
    anchor_BQ = anchors_BA[:, query_Q // block_size]
    return _Layout(length, block_size, window, is_causal).visible(
        query_Q[None, :, None],
        torch.arange(length + num_queries, device=device)[None, None],
        documents_BS[:, None],
        anchor_BQ[..., None],
        documents_BT.gather(1, anchor_BQ)[..., None],
    )[:, None]


def flex_mask(
    documents_BT: Tensor, anchors_BA: Tensor, block_size: int, window: int | None = None, is_causal: bool = True
) -> BlockMask:
    """`dense_mask` as a flex_attention BlockMask, whose empty tiles cost nothing. For CUDA."""
    from speedstack.dflash.flex import make_block_mask  # imports the compiler: only if needed

    num_windows, length = documents_BT.shape
    num_queries = anchors_BA.shape[1] * block_size
    documents_BS = torch.nn.functional.pad(documents_BT, (0, num_queries), value=-1)
    layout = _Layout(length, block_size, window, is_causal)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        anchor = anchors_BA[batch, query // block_size]
        return layout.visible(query, key, documents_BS[batch, key], anchor, documents_BS[batch, anchor])

    return make_block_mask(visible, num_windows, num_queries, length + num_queries, documents_BT.device)


def block_mask(
    documents_BT: Tensor, anchors_BA: Tensor, block_size: int, window: int | None = None, is_causal: bool = True
) -> Tensor | BlockMask:
    """The mask that is fast on the tensors' device: dense for SDPA, a BlockMask on CUDA."""
    make = flex_mask if documents_BT.is_cuda else dense_mask
    return make(documents_BT, anchors_BA, block_size, window, is_causal)


def layer_masks(
    config: DFlashConfig, documents_BT: Tensor, anchors_BA: Tensor
) -> Tensor | BlockMask | list[Tensor | BlockMask]:
    """Masks for `DFlashDraftModel.forward`: one for all layers, or one per layer with sliding windows."""
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    masks = {
        window: block_mask(documents_BT, anchors_BA, config.block_size, window, config.sliding_is_causal)
        for window in dict.fromkeys(windows)
    }
    return masks[None] if config.layer_types is None else [masks[window] for window in windows]

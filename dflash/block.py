"""Training blocks: where they start, what they read, what they must predict, and what each of their queries may see.

A block starts at an anchor position a of a window of real text. Its inputs are the anchor's token and K - 1 masks, its
labels the tokens at a + 1 .. a + K - 1, its context the positions strictly below a, exactly as in serving, where the
target has not yet computed the anchor's features. Many blocks of one window go through the drafter in one pass; the
mask keeps them apart. Windows may hold several documents: a block neither sees nor predicts across a boundary.

Source: DFlash, section on random anchors; mask as in SpecForge, speculators and ModelOpt, which agree.

Shape suffixes: B windows, T positions, A blocks a window, K block size, Q = A * K queries, S = T + Q keys.
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
    """The drafter's training inputs and labels; all int64 but `weight_BAK`, which is bool.

    `weight_BAK` is False where nothing is to be predicted: the anchor itself, positions past the window, in another
    document or excluded by the caller, and every position of a filler block.
    """

    anchors_BA: Tensor
    positions_BQ: Tensor
    input_ids_BQ: Tensor
    labels_BAK: Tensor
    weight_BAK: Tensor


def document_ids(ids_BT: Tensor, separator_id: int) -> Tensor:
    """Number of each position's document, int64 [B, T]; a separator token is its document's last token."""
    is_separator = (ids_BT == separator_id).long()
    return is_separator.cumsum(1) - is_separator


def sample_anchors(
    documents_BT: Tensor, predictable_BT: Tensor, num_anchors: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw anchors uniformly and without repetition from the positions that can be one.

    A position can be an anchor when its document holds at least one position before it (some context) and when the
    next position may be predicted (`predictable_BT`, bool) and is of the same document.

    Returns (anchors int64 [B, A], real bool [B, A]), anchors ascending. Windows with fewer than A possible anchors are
    filled up with position 0, marked not real. Drawn on the CPU, so the same generator gives the same anchors anywhere.
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
) -> Blocks:
    """Inputs, labels and weights of the blocks that start at `anchors_BA`."""
    length = ids_BT.shape[1]
    offsets_K = torch.arange(block_size, device=ids_BT.device)
    positions_BAK = anchors_BA[..., None] + offsets_K
    inside_BAK = positions_BAK < length
    flat_BQ = positions_BAK.clamp(max=length - 1).flatten(1)
    labels_BAK = ids_BT.gather(1, flat_BQ).view_as(positions_BAK)
    same_document_BAK = (
        documents_BT.gather(1, flat_BQ).view_as(positions_BAK) == documents_BT.gather(1, anchors_BA)[..., None]
    )
    predictable_BAK = predictable_BT.gather(1, flat_BQ).view_as(positions_BAK)
    weight_BAK = inside_BAK & same_document_BAK & predictable_BAK & real_BA[..., None] & (offsets_K > 0)
    input_ids_BAK = torch.full_like(labels_BAK, mask_token_id)
    input_ids_BAK[..., 0] = labels_BAK[..., 0]
    return Blocks(anchors_BA, positions_BAK.flatten(1), input_ids_BAK.flatten(1), labels_BAK, weight_BAK)


def _visible(
    key: Tensor, key_document: Tensor, block: Tensor, anchor: Tensor, anchor_document: Tensor, length: int, size: int
) -> Tensor:
    """Whether a query of a block sees a key; elementwise, shared by the dense and the flex_attention mask."""
    context = (key < anchor) & (key_document == anchor_document)
    return torch.where(key < length, context, (key - length) // size == block)


def dense_mask(documents_BT: Tensor, anchors_BA: Tensor, block_size: int) -> Tensor:
    """What each block query sees of T context keys followed by Q block keys, bool [B, 1, Q, S]."""
    length, num_queries = documents_BT.shape[1], anchors_BA.shape[1] * block_size
    device = documents_BT.device
    key_S = torch.arange(length + num_queries, device=device)
    block_Q = torch.arange(num_queries, device=device) // block_size
    documents_BS = torch.nn.functional.pad(documents_BT, (0, num_queries), value=-1)
    anchor_BQ = anchors_BA[:, block_Q]
    return _visible(
        key_S[None, None],
        documents_BS[:, None],
        block_Q[None, :, None],
        anchor_BQ[..., None],
        documents_BT.gather(1, anchor_BQ)[..., None],
        length,
        block_size,
    )[:, None]


def flex_mask(documents_BT: Tensor, anchors_BA: Tensor, block_size: int) -> BlockMask:
    """The mask of `dense_mask` as a flex_attention BlockMask, whose empty tiles cost nothing. For CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask  # pulls in the compiler: only where it is used

    num_windows, length = documents_BT.shape
    num_queries = anchors_BA.shape[1] * block_size
    documents_BS = torch.nn.functional.pad(documents_BT, (0, num_queries), value=-1)

    def visible(window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        anchor = anchors_BA[window, block]
        return _visible(key, documents_BS[window, key], block, anchor, documents_BS[window, anchor], length, block_size)

    return create_block_mask(
        visible, B=num_windows, H=None, Q_LEN=num_queries, KV_LEN=length + num_queries, device=documents_BT.device.type
    )


def block_mask(documents_BT: Tensor, anchors_BA: Tensor, block_size: int) -> Tensor | BlockMask:
    """The mask in the form that is fast on the tensors' device: dense for SDPA, a BlockMask on CUDA."""
    make = flex_mask if documents_BT.is_cuda else dense_mask
    return make(documents_BT, anchors_BA, block_size)


def window_mask(
    documents_BT: Tensor, anchors_BA: Tensor, block_size: int, window: int, is_causal: bool
) -> Tensor | BlockMask:
    """The mask of `block_mask` for a sliding-window layer: of what a block sees, keys less than `window` away.

    Within the block later positions are seen too, unless `is_causal`. Positions count from the start of the window of
    text, which is what rotary embedding sees. Returned in the form that is fast on the tensors' device.
    """
    (num_windows, length), num_queries = documents_BT.shape, anchors_BA.shape[1] * block_size
    documents_BS = torch.nn.functional.pad(documents_BT, (0, num_queries), value=-1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        anchor = anchors_BA[row, block]
        seen = _visible(key, documents_BS[row, key], block, anchor, documents_BS[row, anchor], length, block_size)
        key_position = torch.where(key < length, key, anchor + (key - length) % block_size)
        return seen & in_window(anchor + query % block_size, key_position, window, is_causal)

    if documents_BT.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask  # pulls in the compiler: only where it is used

        return create_block_mask(
            visible, B=num_windows, H=None, Q_LEN=num_queries, KV_LEN=length + num_queries, device="cuda"
        )
    rows_B11, queries_Q1 = torch.arange(num_windows)[:, None, None], torch.arange(num_queries)[:, None]
    return visible(rows_B11, rows_B11, queries_Q1, torch.arange(length + num_queries))[:, None]


def layer_masks(
    config: DFlashConfig, documents_BT: Tensor, anchors_BA: Tensor
) -> Tensor | BlockMask | list[Tensor | BlockMask]:
    """What `DFlashDraftModel.forward` takes as masks: one for all layers, or with sliding windows one a layer."""
    if config.layer_types is None:
        return block_mask(documents_BT, anchors_BA, config.block_size)
    made = {
        window: block_mask(documents_BT, anchors_BA, config.block_size)
        if window is None
        else window_mask(documents_BT, anchors_BA, config.block_size, window, config.sliding_is_causal)
        for window in {config.window(layer) for layer in range(config.num_hidden_layers)}
    }
    return [made[config.window(layer)] for layer in range(config.num_hidden_layers)]

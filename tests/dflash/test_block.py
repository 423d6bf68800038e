"""Blocks and masks against definitions written out position by position."""

from typing import Any

import pytest
import torch

from speedstack.dflash.block import dense_mask, document_ids, layer_masks, make_blocks, sample_anchors, window_mask

SEPARATOR = 0


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 50, (3, 23), generator=torch.Generator().manual_seed(0))
    ids[0, 9] = ids[1, 0] = ids[2, 22] = ids[2, 4] = ids[2, 5] = SEPARATOR
    return ids, document_ids(ids, SEPARATOR)


def test_document_ids_end_with_their_separator():
    assert document_ids(torch.tensor([[5, 0, 6, 0, 0, 7]]), 0).tolist() == [[0, 0, 1, 1, 2, 3]]


@pytest.mark.parametrize("block_size", [2, 4, 7])
def test_dense_mask_is_the_double_loop(block_size):
    ids, documents = windows()
    anchors, _ = sample_anchors(documents, torch.ones_like(ids).bool(), 5, torch.Generator().manual_seed(1))
    mask = dense_mask(documents, anchors, block_size)
    num_windows, length = ids.shape
    num_queries = anchors.shape[1] * block_size
    assert mask.shape == (num_windows, 1, num_queries, length + num_queries)
    for window in range(num_windows):
        for query in range(num_queries):
            anchor = int(anchors[window, query // block_size])
            for key in range(length + num_queries):
                if key < length:
                    seen = key < anchor and bool(documents[window, key] == documents[window, anchor])
                else:
                    seen = (key - length) // block_size == query // block_size
                assert bool(mask[window, 0, query, key]) == seen, (window, query, key)


def test_flex_mask_is_the_dense_mask():
    from torch.nn.attention.flex_attention import create_mask

    from speedstack.dflash.block import flex_mask

    ids, documents = windows()
    anchors, _ = sample_anchors(documents, torch.ones_like(ids).bool(), 5, torch.Generator().manual_seed(1))
    dense = dense_mask(documents, anchors, 4)
    mask_mod = flex_mask(documents, anchors, 4).mask_mod
    assert torch.equal(create_mask(mask_mod, 3, 1, dense.shape[2], dense.shape[3], device="cpu"), dense)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("block_size", "window"), [(4, 1), (4, 3), (4, 9), (7, 5), (4, 1000)])
def test_window_mask_is_the_double_loop(block_size, window, is_causal):
    ids, documents = windows()
    anchors, _ = sample_anchors(documents, torch.ones_like(ids).bool(), 5, torch.Generator().manual_seed(1))
    mask = window_mask(documents, anchors, block_size, window, is_causal)
    num_windows, length = ids.shape
    num_queries = anchors.shape[1] * block_size
    assert isinstance(mask, torch.Tensor) and mask.shape == (num_windows, 1, num_queries, length + num_queries)
    for row in range(num_windows):
        for query in range(num_queries):
            anchor = int(anchors[row, query // block_size])
            query_position = anchor + query % block_size
            for key in range(length + num_queries):
                if key < length:
                    position = key
                    seen = key < anchor and bool(documents[row, key] == documents[row, anchor])
                else:
                    position = anchor + (key - length) % block_size
                    seen = (key - length) // block_size == query // block_size
                    seen = seen and (position <= query_position or not is_causal)
                seen = seen and abs(query_position - position) < window
                assert bool(mask[row, 0, query, key]) == seen, (row, query, key)


def test_every_layer_gets_its_own_mask(draft_config):
    import dataclasses

    ids, documents = windows()
    anchors, _ = sample_anchors(documents, torch.ones_like(ids).bool(), 5, torch.Generator().manual_seed(1))
    same: Any = layer_masks(draft_config, documents, anchors)
    assert torch.equal(same, dense_mask(documents, anchors, 4))
    mixed = dataclasses.replace(
        draft_config, layer_types=("full_attention", "sliding_attention"), sliding_window=3, sliding_is_causal=False
    )
    masks: Any = layer_masks(mixed, documents, anchors)
    full, sliding = masks
    windowed: Any = window_mask(documents, anchors, 4, 3, is_causal=False)
    assert torch.equal(full, dense_mask(documents, anchors, 4))
    assert torch.equal(sliding, windowed)
    assert not torch.equal(full, sliding)


def test_anchors_have_context_and_something_to_predict():
    ids, documents = windows()
    predictable = torch.ones_like(ids).bool()
    predictable[0, 3:6] = False
    anchors, real = sample_anchors(documents, predictable, 23, torch.Generator().manual_seed(2))
    for window in range(3):
        expected = [
            a
            for a in range(1, 22)
            if documents[window, a - 1] == documents[window, a] == documents[window, a + 1]
            and predictable[window, a + 1]
        ]
        assert anchors[window][real[window]].tolist() == expected
        assert anchors[window][~real[window]].eq(0).all()


def test_anchors_are_a_function_of_the_generator_and_spread_out():
    documents = torch.zeros(1, 64, dtype=torch.long)
    predictable = torch.ones(1, 64, dtype=torch.bool)
    draws = [sample_anchors(documents, predictable, 8, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    seen = torch.cat(
        [sample_anchors(documents, predictable, 8, torch.Generator().manual_seed(seed))[0] for seed in range(200)]
    )
    assert seen.unique().tolist() == list(range(1, 63))


def test_labels_and_weights_position_by_position():
    ids, documents = windows()
    predictable = torch.ones_like(ids).bool()
    predictable[1, 12] = False
    anchors, real = sample_anchors(documents, predictable, 22, torch.Generator().manual_seed(2))
    blocks = make_blocks(ids, documents, predictable, anchors, real, 4, mask_token_id=49)
    input_ids = blocks.input_ids_BQ.view(3, -1, 4)
    positions = blocks.positions_BQ.view(3, -1, 4)
    for window in range(3):
        for block, anchor in enumerate(anchors[window].tolist()):
            assert input_ids[window, block].tolist() == [int(ids[window, anchor]), 49, 49, 49]
            assert positions[window, block].tolist() == [anchor, anchor + 1, anchor + 2, anchor + 3]
            for offset in range(4):
                at = anchor + offset
                wanted = (
                    bool(real[window, block])
                    and offset > 0
                    and at < 23
                    and bool(documents[window, at] == documents[window, anchor])
                    and bool(predictable[window, at])
                )
                assert bool(blocks.weight_BAK[window, block, offset]) == wanted
                if wanted:
                    assert blocks.labels_BAK[window, block, offset] == ids[window, at]


def test_a_window_without_anchors_gives_filler_blocks_only():
    ids = torch.tensor([[0, 0, 0, 0, 0, 0]])
    documents = document_ids(ids, SEPARATOR)
    predictable = torch.ones_like(ids).bool()
    anchors, real = sample_anchors(documents, predictable, 3, torch.Generator().manual_seed(0))
    assert not real.any()
    assert not make_blocks(ids, documents, predictable, anchors, real, 4, 2).weight_BAK.any()

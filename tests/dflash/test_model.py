"""Training and serving are one function of the weights: same hidden states at an anchor, whatever else is computed."""

import pytest
import torch

from speedstack.dflash.block import dense_mask, document_ids, make_blocks, sample_anchors
from speedstack.dflash.model import DraftContext

# Training reduces over T + Q keys of which most are masked, serving over the visible ones only, and their matrix
# products have different row counts: the same float32 sums in another order, over a few hundred terms of order one.
TOLERANCE = 1e-5


def training_hidden(drafter, features, embeds, ids, documents, anchors, real):
    config = drafter.config
    predictable = torch.ones_like(ids).bool()
    blocks = make_blocks(ids, documents, predictable, anchors, real, config.block_size, config.mask_token_id)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    mask = dense_mask(documents, anchors, config.block_size)
    hidden = drafter(features, positions, embeds[blocks.input_ids_BQ], blocks.positions_BQ, mask)
    return hidden.unflatten(1, (-1, config.block_size))


def test_training_hidden_states_at_an_anchor_are_the_serving_ones(drafter):
    config = drafter.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (2, 40), generator=generator)
    ids[1, 14] = 0
    documents = document_ids(ids, 0)
    features = torch.randn(2, 40, config.num_taps * config.hidden_size, generator=generator)
    embeds = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    anchors, real = sample_anchors(documents, torch.ones_like(ids).bool(), 10, generator)
    assert real.all()
    with torch.no_grad():
        trained = training_hidden(drafter, features, embeds, ids, documents, anchors, real)
    compared = 0
    for window in range(2):
        for block, anchor in enumerate(anchors[window].tolist()):
            if documents[window, anchor] > 0:
                continue  # a later document's serving context would start at its first token: see the test below
            context = DraftContext(drafter, 64)
            context.write(drafter, features[window, :anchor], start=0)
            block_ids = torch.tensor([int(ids[window, anchor])] + [config.mask_token_id] * config.num_proposals)
            served = context.draft_hidden(drafter, embeds[block_ids], anchor)
            torch.testing.assert_close(trained[window, block, 1:], served, rtol=TOLERANCE, atol=TOLERANCE)
            compared += 1
    assert compared > 10


def test_a_later_document_of_a_window_is_drafted_as_if_alone(drafter):
    """Rotary embedding is relative: the same document at the start of a buffer gives the same hidden states."""
    config = drafter.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size, (1, 40), generator=generator)
    ids[0, 14] = 0
    documents = document_ids(ids, 0)
    features = torch.randn(1, 40, config.num_taps * config.hidden_size, generator=generator)
    embeds = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    anchors, real = torch.tensor([[16, 25]]), torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad():
        trained = training_hidden(drafter, features, embeds, ids, documents, anchors, real)
    for block, anchor in enumerate(anchors[0].tolist()):
        context = DraftContext(drafter, 64)
        context.write(drafter, features[0, 15:anchor], start=0)
        block_ids = torch.tensor([int(ids[0, anchor])] + [config.mask_token_id] * config.num_proposals)
        served = context.draft_hidden(drafter, embeds[block_ids], anchor - 15)
        torch.testing.assert_close(trained[0, block, 1:], served, rtol=TOLERANCE, atol=TOLERANCE)


def test_blocks_do_not_see_each_other_nor_the_anchor_feature(drafter):
    config = drafter.config
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, config.vocab_size, (1, 30), generator=generator)
    documents = document_ids(ids, 0)
    features = torch.randn(1, 30, config.num_taps * config.hidden_size, generator=generator)
    embeds = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    anchors, real = torch.tensor([[5, 12, 20]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        before = training_hidden(drafter, features, embeds, ids, documents, anchors, real)
        features[0, 12:] += 100.0
        ids[0, 20] += 1 if ids[0, 20] < config.vocab_size - 1 else -1
        after = training_hidden(drafter, features, embeds, ids, documents, anchors, real)
    assert torch.equal(before[0, :2], after[0, :2])
    assert not torch.allclose(before[0, 2], after[0, 2])


def test_serving_reads_nothing_at_or_after_the_anchor(drafter):
    """Rejected positions stay in the buffer until they are overwritten; poison there must not show."""
    config = drafter.config
    features = torch.randn(20, config.num_taps * config.hidden_size, generator=torch.Generator().manual_seed(3))
    embeds = torch.randn(config.block_size, config.hidden_size, generator=torch.Generator().manual_seed(4))
    context = DraftContext(drafter, 32)
    context.write(drafter, features, start=0)
    clean = context.draft_hidden(drafter, embeds, anchor=15)
    context.keys_LTGH[:, 15:] = float("nan")
    context.values_LTGH[:, 15:] = float("nan")
    assert torch.equal(context.draft_hidden(drafter, embeds, anchor=15), clean)
    context.write(drafter, features[15:], start=15)
    again = DraftContext(drafter, 32)
    again.write(drafter, features[:7], start=0)
    again.write(drafter, features[7:], start=7)
    # Other row counts, other blocking of the same dot products.
    torch.testing.assert_close(context.keys_LTGH[:, :20], again.keys_LTGH[:, :20], rtol=TOLERANCE, atol=TOLERANCE)


def test_features_of_another_target_and_full_buffers_are_refused(drafter):
    with pytest.raises(ValueError, match="another target"):
        drafter.fuse(torch.zeros(3, 10))
    width = drafter.config.num_taps * drafter.config.hidden_size
    with pytest.raises(ValueError, match=r"positions 6\.\.9 do not fit a context of 8"):
        DraftContext(drafter, 8).write(drafter, torch.zeros(4, width), start=6)


def test_init_is_a_function_of_the_seed(draft_config):
    from speedstack.dflash.model import DFlashDraftModel

    models = [DFlashDraftModel(draft_config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert not torch.equal(models[0].fc.weight, models[2].fc.weight)

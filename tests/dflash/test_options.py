"""Options of the drafter, each against its definition written out; and none of them when it is off."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from speedstack.dflash.attention import attend, attend_with_sinks, rotary_tables, rotate
from speedstack.dflash.block import layer_masks, make_blocks, sample_anchors
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashDraftModel, DraftContext

# Sums of a few hundred float32 terms of order one in another order.
TOLERANCE = 1e-5
MIMO: dict[str, Any] = {
    "layer_types": ("sliding_attention",) * 2,
    "sliding_window": 6,
    "sliding_is_causal": False,
    "attention_sinks": True,
    "attention_value_scale": 0.612,
    "partial_rotary_factor": 0.5,
    "mask_embedding": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mimo": MIMO,
    "causal windows": {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 6},
    "narrower than a block": MIMO | {"sliding_window": 2},
    "anchor slot": {"sample_from_anchor": True},
}


def make(config: DFlashConfig, seed: int = 0, **options: Any) -> DFlashDraftModel:
    model = DFlashDraftModel(dataclasses.replace(config, **options))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sink_bias", "mask_embedding", "markov_w2.weight")):
                parameter.normal_(0.0, 1.0, generator=generator)  # zero, or small, at the start of training
    return model.eval()


def test_a_plain_drafter_has_z_labs_tensors_and_the_same_weights_as_with_options(draft_config):
    plain = make(draft_config)
    rich = DFlashDraftModel(dataclasses.replace(draft_config, markov_rank=4, draft_vocab_size=40, **MIMO))
    rich.init_weights(0)
    extra = set(rich.state_dict()) - set(plain.state_dict())
    assert extra == {
        "layers.0.self_attn.attention_sink_bias",
        "layers.1.self_attn.attention_sink_bias",
        "mask_embedding",
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
        "d2t",
    }
    assert len(plain.state_dict()) == 3 + 2 * 11
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, rich.state_dict()[name]), name
    assert rich.markov_head is not None and not rich.markov_head.markov_w2.weight.any()


def test_five_layers_are_z_labs_58_tensors(draft_config):
    assert len(DFlashDraftModel(dataclasses.replace(draft_config, num_hidden_layers=5)).state_dict()) == 58


def test_sinks_take_their_share_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 3), (2, 5), (2, 5)))
    sinks = torch.randn(4, generator=generator)
    mask = torch.rand(2, 1, 3, 5, generator=generator) > 0.3
    mask[0, 0, 1] = False
    out = attend(q, k, v, mask, sinks)
    for b in range(2):
        for head in range(4):
            for query in range(3):
                weights = [
                    math.exp(float(q[b, head, query] @ k[b, head // 2, key]) / math.sqrt(8))
                    if mask[b, 0, query, key]
                    else 0
                    for key in range(5)
                ]
                total = sum(weights) + math.exp(float(sinks[head]))
                expected = sum((w / total * v[b, head // 2, key] for key, w in enumerate(weights)), torch.zeros(8))
                torch.testing.assert_close(out[b, head, query], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_sink_that_weighs_nothing_is_no_sink():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator) for heads, n in ((4, 3), (2, 5), (2, 5)))
    nothing = torch.full((4,), float("-inf"))
    torch.testing.assert_close(
        attend_with_sinks(q, k, v, None, nothing), attend(q, k, v, None), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_rescales_for_sinks(monkeypatch):
    """The GPU's path, uncompiled: flex_attention and its log-sum-exp against the softmax written out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from speedstack.dflash import flex

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator) for heads, n in ((4, 3), (2, 5), (2, 5)))
    sinks = torch.randn(4, generator=generator)
    block_mask = create_block_mask(lambda b, h, query, key: key <= query + 1, None, None, 3, 5, device="cpu")
    dense = (torch.arange(5) <= torch.arange(3)[:, None] + 1)[None, None]
    torch.testing.assert_close(
        attend(q, k, v, block_mask, sinks), attend(q, k, v, dense, sinks), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_partial_rotary_turns_the_leading_dimensions_only():
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3, 4, 9], [0, 1, 2]])
    out = rotate(x, rotary_tables(positions, 8, 1e4, torch.float32))
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert torch.equal(out[..., :8], rotate(x[..., :8], rotary_tables(positions, 8, 1e4, torch.float32)))


def test_value_scale_is_a_factor_on_the_values(draft_config):
    plain, scaled = make(draft_config), make(draft_config, attention_value_scale=0.5)
    context, positions = torch.randn(1, 7, 64), torch.arange(7)[None]
    (k, v), (scaled_k, scaled_v) = (m.context_kv(0, context, positions) for m in (plain, scaled))
    assert torch.equal(k, scaled_k) and torch.equal(v * 0.5, scaled_v)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_training_hidden_states_are_the_serving_ones(draft_config, options):
    drafter = make(draft_config, **options)
    config = drafter.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (2, 40), generator=generator)
    documents = torch.zeros_like(ids)
    features = torch.randn(2, 40, config.num_taps * config.hidden_size, generator=generator)
    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    predictable = torch.ones_like(ids).bool()
    anchors, real = sample_anchors(documents, predictable, 12, generator)
    blocks = make_blocks(ids, documents, predictable, anchors, real, config.block_size, config.mask_token_id)
    positions = torch.arange(40)[None].expand_as(ids)
    with torch.no_grad():
        trained = drafter(
            features,
            positions,
            drafter.embed_block(blocks.input_ids_BQ, embedding),
            blocks.positions_BQ,
            layer_masks(config, documents, anchors),
        ).unflatten(1, (-1, config.block_size))
    for window in range(2):
        for block, anchor in enumerate(anchors[window].tolist()):
            context = DraftContext(drafter, 64)
            context.write(drafter, features[window, :anchor], start=0)
            block_ids = torch.tensor([int(ids[window, anchor])] + [config.mask_token_id] * (config.block_size - 1))
            with torch.no_grad():
                served = context.draft_hidden(drafter, drafter.embed_block(block_ids, embedding), anchor)
            assert served.shape == (config.num_proposals, config.hidden_size)
            expected = trained[window, block, drafter.hidden_slots]
            torch.testing.assert_close(expected, served, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_window_forgets_what_lies_before_it(draft_config):
    """Two sliding layers still reach the context at most one window back: features enter every layer unmixed."""
    drafter = make(draft_config, **MIMO)
    features = torch.randn(30, 128, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    first, second = DraftContext(drafter, 32), DraftContext(drafter, 32)
    first.write(drafter, features, start=0)
    features[:15] += 10.0
    second.write(drafter, features, start=0)
    assert torch.equal(first.draft_hidden(drafter, embeds, 20), second.draft_hidden(drafter, embeds, 20))
    assert not torch.equal(first.draft_hidden(drafter, embeds, 19), second.draft_hidden(drafter, embeds, 19))


def test_one_mask_for_all_layers_is_refused_where_layers_differ(draft_config):
    drafter = make(draft_config, **MIMO)
    with pytest.raises(ValueError, match="a mask a layer"):
        drafter(torch.zeros(1, 5, 128), torch.arange(5)[None], torch.zeros(1, 4, 64), torch.arange(5, 9)[None], None)


def test_masked_slots_have_the_drafters_own_embedding(draft_config):
    drafter = make(draft_config, mask_embedding=True)
    embedding = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[7, 2, 2, 2], [9, 2, 2, 2]])
    embeds = drafter.embed_block(ids, embedding)
    assert torch.equal(embeds[:, 0], embedding[[7, 9]])
    assert drafter.mask_embedding is not None
    assert torch.equal(embeds[:, 1:], drafter.mask_embedding.expand(2, 3, 64))
    drafter.init_mask_embedding(embedding)
    assert torch.equal(drafter.embed_block(ids, embedding), F.embedding(ids, embedding))
    assert torch.equal(make(draft_config).embed_block(ids, embedding), F.embedding(ids, embedding))


def test_plain_logits_are_the_targets_head(draft_config):
    drafter = make(draft_config)
    hidden, head = torch.randn(5, 3, 64), torch.randn(128, 64)
    logits = drafter.logits(hidden, None, head)
    assert torch.equal(logits, F.linear(hidden, head))
    assert drafter.logits(hidden, None, head.bfloat16()).dtype == torch.float32
    ids = torch.arange(128)
    assert torch.equal(drafter.target_ids(ids), ids) and torch.equal(drafter.draft_ids(ids), ids)


def test_markov_head_adds_a_row_of_w1_w2(draft_config):
    drafter = make(draft_config, markov_rank=4)
    hidden, head, previous = torch.randn(5, 3, 64), torch.randn(128, 64), torch.randint(0, 128, (5, 3))
    logits = drafter.logits(hidden, previous, head)
    assert drafter.markov_head is not None
    table = drafter.markov_head.markov_w1.weight @ drafter.markov_head.markov_w2.weight.T
    torch.testing.assert_close(logits, hidden @ head.T + table[previous], rtol=TOLERANCE, atol=10 * TOLERANCE)
    # One position at a time, as serving does, is the same function.
    alone = drafter.logits(hidden[:, 1], previous[:, 1], head)
    torch.testing.assert_close(alone, logits[:, 1], rtol=TOLERANCE, atol=10 * TOLERANCE)
    with pytest.raises(ValueError, match="pass previous_ids"):
        drafter.logits(hidden, None, head)


@pytest.mark.parametrize("markov_rank", [0, 4])
def test_a_pruned_vocabulary_is_those_columns_of_the_whole(draft_config, markov_rank):
    pruned = make(draft_config, draft_vocab_size=40, markov_rank=markov_rank)
    ids = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:40].sort().values
    pruned.set_draft_vocab(ids)
    assert torch.equal(pruned.target_ids(torch.arange(40)), ids)
    assert pruned.d2t is not None and torch.equal(pruned.d2t, ids - torch.arange(40))  # EAGLE-3 stores offsets
    everything = pruned.draft_ids(torch.arange(128))
    assert torch.equal(everything[ids], torch.arange(40))
    assert (everything == -1).sum() == 88
    hidden, head, previous = torch.randn(6, 64), torch.randn(128, 64), torch.randint(0, 128, (6,))
    logits = pruned.logits(hidden, previous, head)
    assert logits.shape == (6, 40)
    assert torch.equal(logits, pruned.logits(hidden, previous, pruned.draft_head(head)))
    expected = (hidden @ head.T)[:, ids]
    if pruned.markov_head is not None:
        expected = expected + pruned.markov_head(previous)
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize(
    "ids", [torch.arange(39), torch.arange(40).flip(0), torch.arange(89, 129), torch.tensor([0, 0, *range(2, 40)])]
)
def test_draft_vocabularies_that_make_no_sense_are_refused(draft_config, ids):
    drafter = make(draft_config, draft_vocab_size=40)
    with pytest.raises(ValueError, match="draft"):
        drafter.set_draft_vocab(ids)

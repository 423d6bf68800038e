"""Shapes and options of drafters: published defaults, and what is refused."""

import dataclasses

import pytest

from speedstack.dflash.config import default_target_layer_ids


def test_default_layers_are_the_published_ones():
    assert default_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_target_layer_ids(36, 1) == (18,)
    with pytest.raises(ValueError, match="no 5 evenly spaced taps"):
        default_target_layer_ids(6, 5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_dim", 15, "even"),
        ("num_key_value_heads", 3, "multiple"),
        ("block_size", 1, "at least 2"),
        ("mask_token_id", 128, "vocabulary"),
        ("target_layer_ids", (0, 3), "distinct layers"),
        ("target_layer_ids", (1, 1), "distinct layers"),
        ("hidden_size", 0, "at least 1"),
        ("markov_rank", -1, "markov_rank"),
        ("draft_vocab_size", 128, "less than the vocabulary"),
        ("layer_types", ("full_attention",), "1 layers of 2"),
        ("layer_types", ("full_attention", "local"), "neither"),
        ("layer_types", ("full_attention", "sliding_attention"), "need a sliding_window"),
        ("attention_value_scale", 0.0, "positive"),
        ("partial_rotary_factor", 0.2, "even number"),
        ("partial_rotary_factor", 1.5, "even number"),
    ],
)
def test_impossible_values_are_refused(draft_config, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(draft_config, **{field: value})


def test_options_are_named(draft_config):
    assert draft_config.options == {}
    assert dataclasses.replace(draft_config, markov_rank=4, attention_sinks=True).options == {
        "markov_rank": 4,
        "attention_sinks": True,
    }


def test_full_attention_has_one_spelling(draft_config):
    spelled = dataclasses.replace(draft_config, layer_types=("full_attention",) * 2, sliding_window=9)
    assert spelled == draft_config


def test_the_anchor_slot_adds_a_proposal(draft_config):
    assert draft_config.num_proposals == 3
    assert dataclasses.replace(draft_config, sample_from_anchor=True).num_proposals == 4


def test_rotated_dimensions_are_rounded_down(draft_config):
    assert dataclasses.replace(draft_config, head_dim=192, partial_rotary_factor=0.334).rotary_dim == 64

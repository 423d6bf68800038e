"""z-lab's config.json: round trip, published shape, keys of the options, and what is refused."""

import dataclasses

import pytest

from speedstack.dflash.formats.zlab import from_json, to_json

PUBLISHED_KEYS = """
    architectures attention_bias attention_dropout auto_map block_size dflash_config dtype head_dim hidden_act
    hidden_size intermediate_size layer_types max_position_embeddings max_window_layers model_type
    num_attention_heads num_hidden_layers num_key_value_heads num_target_layers rms_norm_eps rope_scaling rope_theta
    sliding_window tie_word_embeddings use_sliding_window vocab_size
"""
MIMO = {
    "layer_types": ("sliding_attention",) * 2,
    "sliding_window": 9,
    "sliding_is_causal": False,
    "attention_sinks": True,
    "attention_value_scale": 0.612,
    "partial_rotary_factor": 0.5,
    "mask_embedding": True,
}


def test_round_trip(draft_config):
    assert from_json(to_json(draft_config, "bfloat16")) == draft_config


def test_block_size_and_rope_are_found_where_newer_checkpoints_keep_them(draft_config):
    raw = to_json(draft_config, "bfloat16")
    raw["dflash_config"]["block_size"] = raw.pop("block_size")
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    assert from_json(raw) == draft_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["DFlash2DraftModel"]),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn"}),
        ("projector_type", "domino"),
        ("is_causal", True),
        ("dflash_config", {"mask_token_id": 2, "target_layer_ids": [0, 2], "final_logit_softcapping": 30.0}),
    ],
)
def test_what_would_be_computed_differently_is_refused(draft_config, key, value):
    with pytest.raises(ValueError, match="not supported"):
        from_json(to_json(draft_config, "bfloat16") | {key: value})


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "block_size", "dflash_config"])
def test_a_missing_key_is_named(draft_config, key):
    raw = to_json(draft_config, "bfloat16")
    del raw[key]
    with pytest.raises(ValueError, match="mask_token_id" if key == "dflash_config" else key):
        from_json(raw)


def test_plain_drafters_have_exactly_the_published_keys(draft_config):
    raw = to_json(draft_config, "bfloat16")
    assert raw["architectures"] == ["DFlashDraftModel"]
    assert raw["dflash_config"] == {"mask_token_id": 2, "target_layer_ids": [0, 2]}
    assert set(raw) == set(PUBLISHED_KEYS.split()) | {"target_sha256"}


@pytest.mark.parametrize(
    "options",
    [
        {"sample_from_anchor": True},
        {"markov_rank": 4},
        {"draft_vocab_size": 50},
        {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 9},
        MIMO,
        MIMO | {"sample_from_anchor": True, "markov_rank": 4, "draft_vocab_size": 50},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_round_trip(draft_config, options):
    config = dataclasses.replace(draft_config, **options)
    assert set(config.options) == set(options)
    assert from_json(to_json(config, "bfloat16")) == config


@pytest.mark.parametrize("option", [{"sample_from_anchor": True}, {"markov_rank": 4}, {"draft_vocab_size": 50}])
def test_what_other_loaders_would_ignore_has_an_architecture_they_refuse(draft_config, option):
    raw = to_json(dataclasses.replace(draft_config, **option), "bfloat16")
    assert raw["architectures"] == ["SpeedstackDFlashDraftModel"]
    assert "auto_map" not in raw


def test_keys_of_mimos_drafters(draft_config):
    """As in the public loaders: is_causal (SGLang), use_swa and swa_window_size (vLLM), the rest in dflash_config."""
    raw = to_json(dataclasses.replace(draft_config, **MIMO), "bfloat16")
    assert raw["is_causal"] is False and raw["sliding_window"] == 9 and raw["use_sliding_window"] is True
    assert raw["partial_rotary_factor"] == 0.5 and raw["rope_parameters"]["rope_dim"] == 8
    nested = raw["dflash_config"]
    assert nested["use_swa"] is True and nested["swa_window_size"] == 9
    assert nested["attention_sink_bias"] is True and nested["attention_value_scale"] == 0.612


def test_use_swa_alone_makes_every_layer_slide(draft_config):
    raw = to_json(draft_config, "bfloat16")
    raw["dflash_config"] |= {"use_swa": True, "swa_window_size": 7}
    config = from_json(raw)
    assert config.layer_types == ("sliding_attention",) * 2
    assert config.sliding_window == 7 and not config.sliding_is_causal


def test_sliding_layers_are_causal_unless_the_config_says_otherwise(draft_config):
    raw = to_json(draft_config, "bfloat16")
    raw |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7, "use_sliding_window": True}
    assert from_json(raw).sliding_is_causal
    assert not from_json(raw | {"is_causal": False}).sliding_is_causal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}, "use_sliding_window is false"),
        ({"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}, "lacks sliding_window"),
        ({"layer_types": 3}, "must be a list"),
        ({"target_layer_ids": "all", "dflash_config": {"mask_token_id": 2}}, "list of integers"),
        ({"dflash_config": {"mask_token_id": 2, "target_layer_ids": [0, 7]}}, "distinct layers of 0..2"),
        ({"rope_theta": "large"}, "must be a number"),
        ({"block_size": True}, "must be an integer"),
        ({"markov_rank": 4, "markov_head_type": "gated"}, "markov_head_type"),
        ({"enable_confidence_head": True}, "enable_confidence_head"),
        (
            {"use_swa": True, "swa_window_size": 5, "is_causal": True, "layer_types": ["sliding_attention"] * 2},
            "causal",
        ),
        ({"use_swa": "yes"}, "true or false"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4}}, "loaders disagree"),
        ({"rope_parameters": {"rope_dim": 7, "rope_theta": 1e4}}, "rotates 7 of 16"),
    ],
)
def test_nonsense_is_named(draft_config, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_json(to_json(draft_config, "bfloat16") | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "factor"),
    [({"partial_rotary_factor": 0.25, "rope_dim": 16}, 1.0), ({"rope_dim": 8}, 0.5), ({"rope_type": "default"}, 1.0)],
)
def test_rope_dim_says_how_much_is_rotated(draft_config, rope, factor):
    raw = to_json(draft_config, "bfloat16") | {"rope_parameters": rope | {"rope_theta": 1e4}}
    assert from_json(raw).partial_rotary_factor == factor
    del raw["rope_parameters"]
    assert from_json(raw | {"partial_rotary_factor": 0.5}).partial_rotary_factor == 0.5

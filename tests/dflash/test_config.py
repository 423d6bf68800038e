"""z-lab's config.json: round trip, published shape, and what is refused."""

import pytest

from speedstack.dflash.config import DFlashConfig, default_target_layer_ids


def test_round_trip(draft_config):
    assert DFlashConfig.from_json(draft_config.to_json("bfloat16")) == draft_config


def test_block_size_and_rope_are_found_where_newer_checkpoints_keep_them(draft_config):
    raw = draft_config.to_json("bfloat16")
    raw["dflash_config"]["block_size"] = raw.pop("block_size")
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    assert DFlashConfig.from_json(raw) == draft_config


def test_default_layers_are_the_published_ones():
    assert default_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_target_layer_ids(36, 1) == (18,)
    with pytest.raises(ValueError, match="no 5 evenly spaced taps"):
        default_target_layer_ids(6, 5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["DFlash2DraftModel"]),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn"}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("is_causal", True),
        ("dflash_config", {"mask_token_id": 2, "target_layer_ids": [0, 2], "use_swa": True}),
    ],
)
def test_what_would_be_computed_differently_is_refused(draft_config, key, value):
    with pytest.raises(ValueError, match="not supported"):
        DFlashConfig.from_json(draft_config.to_json("bfloat16") | {key: value})


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "num_target_layers", "dflash_config"])
def test_a_missing_key_is_named(draft_config, key):
    raw = draft_config.to_json("bfloat16")
    del raw[key]
    with pytest.raises(ValueError, match="mask_token_id" if key == "dflash_config" else key):
        DFlashConfig.from_json(raw)


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
    ],
)
def test_impossible_values_are_refused(draft_config, field, value, message):
    import dataclasses

    with pytest.raises(ValueError, match=message):
        dataclasses.replace(draft_config, **{field: value})

"""config.json in others' words: translated, held to each other, or refused by name; never a default without a word."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from speedstack.quant.checkpoint.config import build_skeleton, config_from_fields
from speedstack.quant.checkpoint.names import FAMILIES
from speedstack.quant.checkpoint.spelling import transformers_fields
from speedstack.quant.checkpoint.spelling.families import HARD_WIRED

MIMO: dict[str, Any] = {
    **{"model_type": "mimo_v2_flash", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 48, "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
}
MIMO_MAKERS = MIMO | {
    **{"hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 0, 1], "rope_theta": 3e5, "swa_rope_theta": 7e3},
    **{"partial_rotary_factor": 0.25, "layernorm_epsilon": 1e-4, "sliding_window_size": 8, "sliding_window": 8},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 48, "swa_v_head_dim": 32},
    **{"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "scoring_func": "sigmoid"},
    **{"topk_method": "noaux_tc", "n_shared_experts": None, "attention_chunk_size": 8, "routed_scaling_factor": None},
}
QWEN3: dict[str, Any] = {"model_type": "qwen3_moe", "head_dim": 16, "hidden_size": 64, "rope_theta": 1e6}
# What is in the files of released models and says nothing of the computation, or says it twice.
RELEASED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
        "moe_layer_freq": 1,
    },
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "ep_size": 1},
    "glm4_moe": {"num_nextn_predict_layers": 1, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_theta": 1e6},
    "gpt_oss": {"experts_per_token": 4, "num_experts_per_tok": 4, "initial_context_length": 4096, "swiglu_limit": 7.0},
    "mimo_v2_flash": {"attention_chunk_size": 128, "n_shared_experts": None, "moe_router_dtype": "float32"},
    "mixtral": {"rope_theta": 1e6, "router_jitter_noise": 0.0, "sliding_window": None, "torch_dtype": "bfloat16"},
    "olmoe": {"clip_qkv": None, "rope_scaling": None, "rope_theta": 1e4, "norm_topk_prob": False},
    "qwen2_moe": {"use_mrope": False, "max_window_layers": 28, "use_sliding_window": False, "qkv_bias": True},
    "qwen3_moe": QWEN3 | {"max_window_layers": 48, "rope_scaling": None, "decoder_sparse_step": 1},
    "hunyuan_v1_moe": {
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "factor": 1.0, "mscale": 1.0, "type": "dynamic"},
    },
    "phimoe": {
        "rope_scaling": {
            **{"long_factor": [2.0] * 64, "short_factor": [1.0] * 64, "long_mscale": 1.2, "short_mscale": 1.2},
            **{"original_max_position_embeddings": 4096, "type": "longrope"},
        },
    },
    "minimax_m2": {
        "rotary_dim": 64,
        "moe_intermediate_size": 8,
        "intermediate_size": 8,
        "attn_type_list": [1, 1],
        "layernorm_mlp_beta": 1.0,
        "shared_moe_mode": "sigmoid",
        "mlp_intermediate_size": 8,
        "use_mtp": True,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
    },
}


def test_makers_keys_of_mimo_are_transformers() -> None:
    config: Any = config_from_fields(MIMO_MAKERS)
    assert config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert config.mlp_layer_types == ["dense", "dense", "sparse"]
    assert config.sliding_window == 9, "the token itself counts in transformers"
    assert config.rms_norm_eps == 1e-4
    ropes = config.rope_parameters
    assert [ropes[each]["rope_theta"] for each in ("full_attention", "sliding_attention")] == [3e5, 7e3]
    assert {ropes[each]["partial_rotary_factor"] for each in ropes} == {0.25}


def test_makers_keys_of_mimo_beside_the_rotary_embedding_of_one_kind_of_layer() -> None:
    flat = {"rope_theta": 3e5, "partial_rotary_factor": 0.25, "rope_type": "default"}
    assert (
        config_from_fields(MIMO_MAKERS | {"rope_parameters": flat}).to_dict()
        == config_from_fields(MIMO_MAKERS).to_dict()
    )
    with pytest.raises(ValueError, match="needs swa_rope_theta"):
        config_from_fields(MIMO_MAKERS | {"rope_parameters": flat, "swa_rope_theta": None})
    with pytest.raises(ValueError, match="are not what a mimo_v2_flash model computes"):
        config_from_fields(MIMO_MAKERS | {"rope_parameters": flat | {"rope_type": "linear", "factor": 2.0}})


def test_both_spellings_in_one_file_must_agree() -> None:
    saved: dict[str, Any] = config_from_fields(MIMO_MAKERS).to_dict()
    both = MIMO_MAKERS | {key: saved[key] for key in ("layer_types", "mlp_layer_types", "rope_parameters")}
    assert config_from_fields(both).to_dict() == saved
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layer_types": ["full_attention"] * 3}, "layer_types .* and hybrid_layer_pattern contradict"),
        ({"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types .* and moe_layer_freq contradict"),
        ({"swa_rope_theta": 9e3}, r"swa_rope_theta and rope_parameters\.sliding_attention contradict"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 and layernorm_epsilon contradict"),
    ]
    for changes, match in cases:
        with pytest.raises(ValueError, match=match):
            config_from_fields(both | changes)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (MIMO_MAKERS | {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern has 2 entries, num_hidden_layers is 3"),
        (MIMO_MAKERS | {"moe_layer_freq": [0, 1, 2]}, r"moe_layer_freq is no list of 0 and 1: \[0, 1, 2\]"),
        (MIMO_MAKERS | {"moe_layer_freq": 1}, "moe_layer_freq is no list of 0 and 1: 1"),
        (MIMO_MAKERS | {"swa_rope_theta": None}, "needs swa_rope_theta"),
        (MIMO_MAKERS | {"sliding_window_size": "8"}, "sliding_window_size is no integer: '8'"),
        (MIMO_MAKERS | {"swa_num_key_value_heads": 2}, "swa_num_key_value_heads 2 is not twice num_key_value_heads 2"),
        (MIMO_MAKERS | {"swa_head_dim": 64}, "head_dim 48 and swa_head_dim 64 contradict"),
        (MIMO_MAKERS | {"add_full_attention_sink_bias": True}, "add_full_attention_sink_bias True is not what a mimo"),
        (MIMO_MAKERS | {"n_shared_experts": 1}, "n_shared_experts 1 is not what a mimo_v2_flash model computes"),
        (MIMO_MAKERS | {"attention_projection_layout": "fused_qkv"}, "attention_projection_layout 'fused_qkv' is not"),
        (MIMO_MAKERS | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling .* is not what a mimo"),
        (QWEN3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not what a qwen3_moe model computes"),
        (QWEN3 | {"rope_thetta": 1e5}, r"does not read the key 'rope_thetta' \(did you mean 'rope_theta'\?\)"),
        ({"model_type": "qwen3_moe", "hiden_size": 32}, r"'hiden_size' \(did you mean 'hidden_size'\?\)"),
        (QWEN3 | {"router_scale": 2.5}, "Qwen3MoeConfig of transformers does not read the key 'router_scale'"),
        (QWEN3 | {"final_logit_softcapping": 30.0}, "'final_logit_softcapping'"),
        (QWEN3 | {"num_experts": 8, "num_local_experts": 4}, "num_experts 8 and num_local_experts 4 contradict"),
        (
            QWEN3 | {"rope_scaling": {"rope_type": "yarn", "facter": 4.0}},
            r"rope_scaling has the key 'facter'.*'factor'",
        ),
        (QWEN3 | {"rope_scaling": 4.0}, "rope_scaling is no object: 4.0"),
        (QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 1000000.0 and 500000.0"),
        (
            QWEN3 | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters .* and rope_scaling .* contradict",
        ),
        ({"model_type": "gpt_oss", "num_experts_per_tok": 4, "experts_per_token": 8}, "and experts_per_token 8 contra"),
        ({"model_type": "minimax_m2", "attn_type_list": [1, 0]}, r"attn_type_list \[1, 0\] is not what a minimax_m2"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func 'softmax' is not what a deepseek_v3"),
        ({"model_type": "olmoe", "num_experts_per_token": 8}, "did you mean 'num_experts_per_tok'"),
        (
            {"model_type": "qwen2_moe", "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
            "rope_type",
        ),
        ({"model_type": "olmoe", "rope_scaling": {"factor": 8.0}}, "rope_scaling has factor 8.0, which .* 'default'"),
        (
            {
                "model_type": "glm4_moe",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 4.0},
            },
            "low_freq_factor 4.0, which a rotary embedding of type 'linear' does not read",
        ),
        (
            {"model_type": "mixtral", "rope_parameters": {"rope_theta": 1e5, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters has 'rope_theta' beside an object for each kind of layer",
        ),
        ({"model_type": "olmoe", "rotary_dim": 32}, "does not read the key 'rotary_dim'"),
        ({"model_type": "olmoe", "rope_theta": -1e4}, "rope_theta is -10000.0 and should be a number above 0"),
        ({"model_type": "mixtral", "rope_parameters": {"rope_theta": "1e6"}}, r"rope_parameters\.rope_theta is '1e6'"),
        ({"model_type": "glm4_moe", "routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
        ({"model_type": "olmoe", "rope_scaling": {"type": "yarn", "factor": float("inf")}}, "factor is inf"),
        ({"model_type": "gpt_oss", "hidden_act": "gelu"}, "hidden_act 'gelu' is not what a gpt_oss model computes"),
        ({"model_type": "minimax_m2", "norm_topk_prob": False}, "norm_topk_prob False is not what a minimax_m2"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob True is not what a deepseek_v2"),
        ({"model_type": "phimoe", "norm_topk_prob": False}, "does not read the key 'norm_topk_prob'"),
        ({"model_type": "olmoe", "dtype": "float16", "torch_dtype": "bfloat16"}, "dtype 'float16' and torch_dtype"),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"num_expert_per_tok": 4}},
            r"text_config: .*'num_expert_per_tok' \(did you mean 'num_experts_per_tok'\?\)",
        ),
        (
            {"model_type": "llama4", "text_config": {"rope_scaling": {"type": "default", "factor": 8.0}}},
            "text_config: ",
        ),
        ({"model_type": "qwen3_5_moe", "rope_theta": 1e7, "text_config": {}}, "rope_theta .* beside text_config"),
        ({"model_type": ["qwen3_moe"]}, r"transformers knows no model_type \['qwen3_moe'\]"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        transformers_fields(fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", RELEASED)
def test_keys_of_released_models_pass(model_type: str) -> None:
    beside: dict[str, Any] = {
        "architectures": ["X"],
        "auto_map": {"AutoModel": "x.Y"},
        "_name_or_path": "x",
        "unsloth_version": "1",
    }
    beside |= {"tokenizer_class": None, "temperature": 0.6, "do_sample": True, "use_cache": True, "my_note": "x"}
    config_from_fields({"model_type": model_type} | beside | RELEASED[model_type])


@pytest.mark.parametrize("model_type", [*FAMILIES, "minimax_m2"])
def test_what_transformers_saves_passes_unchanged(model_type: str) -> None:
    fields = CONFIG_MAPPING[model_type]().to_dict()
    assert transformers_fields(fields) == fields


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("qwen2_moe", "num_local_experts"), ("mimo_v2_flash", "num_experts"), ("olmoe", "n_routed_experts")],
)
def test_number_of_experts_under_any_of_its_names(model_type: str, key: str) -> None:
    fields = {"model_type": model_type, key: 5, "num_experts_per_tok": 2}
    config: Any = config_from_fields(fields)
    assert 5 in (getattr(config, "num_experts", None), getattr(config, "n_routed_experts", None))
    own = "n_routed_experts" if model_type == "mimo_v2_flash" else "num_experts"
    with pytest.raises(ValueError, match=f"{own} 6 and {key} 5 contradict"):
        config_from_fields(fields | {own: 6})


def test_a_choice_of_experts_that_cannot_be_is_refused() -> None:
    for top_k in (0, -1, 7):
        with pytest.raises(ValueError, match=f"num_experts_per_tok {top_k} is no choice of 6 experts"):
            config_from_fields({"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": top_k})


GROUPS: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "glm4_moe"} | GROUPS | {"topk_group": 5}, "topk_group 5 of n_group 4 is no choice of groups"),
        ({"model_type": "deepseek_v2"} | GROUPS | {"topk_group": 0}, "topk_group 0 of n_group 4 is no choice"),
        ({"model_type": "deepseek_v3"} | GROUPS | {"n_group": 3}, "topk_group 2 of n_group 3 .* of 8 experts"),
        ({"model_type": "deepseek_v3"} | GROUPS | {"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than"),
        ({"model_type": "mixtral", "num_key_value_heads": 5}, "num_attention_heads 32 are not shared evenly by"),
        ({"model_type": "olmoe", "num_key_value_heads": 0}, "not shared evenly by num_key_value_heads 0"),
        ({"model_type": "qwen2_moe", "num_hidden_layers": 0}, "num_hidden_layers 0 is no model"),
        ({"model_type": "gpt_oss", "sliding_window": None}, "sliding_window None is no number of tokens"),
        ({"model_type": "gpt_oss", "sliding_window": -8}, "sliding_window -8 is no number of tokens"),
        ({"model_type": "olmoe", "rms_norm_eps": -1e-5}, "rms_norm_eps -1e-05 is below 0"),
        ({"model_type": "olmoe", "rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling.factor is -2.0"),
    ],
)
def test_numbers_that_compute_nothing_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        config_from_fields(fields)
    assert "\n" not in str(caught.value)


def test_a_padding_token_outside_the_vocabulary_is_one_line() -> None:
    fields = {"model_type": "mixtral", "vocab_size": 64, "pad_token_id": 99}
    with pytest.raises(ValueError, match=r"makes no model of this mixtral configuration.*Padding_idx"):
        build_skeleton(config_from_fields(fields))


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe"])
def test_a_rotary_embedding_by_kind_of_layer_is_refused_where_the_class_has_one_for_all(model_type: str) -> None:
    fields = {
        "model_type": model_type,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}},
    }
    with pytest.raises(ValueError, match=r"rope_parameters\.full_attention is not read"):
        config_from_fields(fields)


def test_a_text_part_is_spelled_as_a_model_of_its_own() -> None:
    part = {"num_local_experts": 6, "num_experts_per_tok": 2, "rope_theta": 3e5, "rope_scaling": None}
    config: Any = config_from_fields({"model_type": "qwen3_5_moe", "text_config": part}).get_text_config()
    assert (config.num_experts, config.rope_parameters["rope_theta"]) == (6, 3e5)


@pytest.mark.parametrize("model_type", [*FAMILIES, "minimax_m2"])
def test_fields_that_a_class_has_and_no_model_reads_are_hard_wired(model_type: str) -> None:
    """Of the installed transformers: a field of a later release that its model ignores turns this red."""
    config_class = CONFIG_MAPPING[model_type]
    place = Path(str(sys.modules[config_class.__module__].__file__))
    configuration = place.read_text("utf-8")
    model = place.with_name(place.name.replace("configuration_", "modeling_")).read_text("utf-8")
    bookkeeping = {"use_cache", "pretraining_tp", "output_router_logits", "router_jitter_noise", "compress_rope_theta"}
    bookkeeping |= {"num_mtp_layers", "num_nextn_predict_layers", "moe_intermediate_size"}
    own = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own -= {*config_class.attribute_map, *config_class.attribute_map.values(), *bookkeeping}
    ignored = {
        name
        for name in own
        if not re.search(rf"""config\.{name}\b|["']{name}["']""", model)
        and not re.search(rf"self\.{name}\b", configuration)
    }
    assert ignored - {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"} <= set(
        HARD_WIRED[model_type]
    )

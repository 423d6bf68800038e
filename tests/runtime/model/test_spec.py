"""Specs: what is read from configs, and what is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from speedstack.quant.mxfp4 import quantize
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.spec import DenseSpec, MoeSpec
from speedstack.runtime.model.weights import read_weights


def test_mimo_v2_flash_as_released() -> None:
    """The defaults of the transformers config are the released model's (MiMo-V2-Flash paper, table 1)."""
    from transformers import MiMoV2FlashConfig

    spec = spec_from_config(MiMoV2FlashConfig())
    full, sliding = spec.layers[0].attention, spec.layers[1].attention
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (48, 4096, 152576)
    assert (full.num_heads, full.num_kv_heads, full.qk_head_dim, full.v_head_dim) == (64, 4, 192, 128)
    assert (sliding.num_kv_heads, sliding.has_sinks, full.has_sinks) == (8, True, False)
    assert (full.window, sliding.window) == (None, 129)
    assert (full.rotary_dim, full.rope_theta, sliding.rope_theta) == (64, 5e6, 1e4)
    assert spec.layers[0].mlp == DenseSpec(16384)
    assert spec.layers[1].mlp == MoeSpec(256, 8, 2048, "sigmoid", True, True, 1.0)
    assert sum(layer.attention.window is None for layer in spec.layers) == 9


def test_qwen3_moe() -> None:
    from transformers import Qwen3MoeConfig

    spec = spec_from_config(Qwen3MoeConfig(eos_token_id=[1, 2], mlp_only_layers=[3]))
    assert spec.eos_token_ids == (1, 2)
    assert spec.layers[0].attention.has_qk_norm
    assert isinstance(spec.layers[3].mlp, DenseSpec) and isinstance(spec.layers[4].mlp, MoeSpec)


def test_what_cannot_be_decoded_is_refused_by_name(make_tiny_model: Callable[..., Any]) -> None:
    from transformers import LlamaConfig, Qwen3MoeConfig

    with pytest.raises(ValueError, match=r"'llama'.*mimo_v2_flash, qwen3_moe"):
        spec_from_config(LlamaConfig())
    with pytest.raises(ValueError, match="gelu"):
        spec_from_config(Qwen3MoeConfig(hidden_act="gelu"))
    with pytest.raises(ValueError, match="n_group=2"):
        spec_from_config(make_tiny_model(n_group=2, topk_group=1).config)
    with pytest.raises(ValueError, match="rotary type 'linear'"):
        rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        spec_from_config(Qwen3MoeConfig(rope_parameters=rope))


def test_weights_that_do_not_fit_are_refused_by_name(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    spec, complete = spec_from_config(model.config), dict(model.state_dict())

    def read(**changes: Any) -> None:
        tensors = {name: t for name, t in (complete | changes).items() if t is not None}
        read_weights(spec, tensors, torch.float32, torch.device("cpu"), tied=False)

    read()
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        read(**{name: None})
    with pytest.raises(ValueError, match=f"'{name}' has shape"):
        read(**{name: complete[name][1:]})
    with pytest.raises(ValueError, match=r"would ignore 1 tensors.*'extra'"):
        read(extra=complete[name])
    with pytest.raises(ValueError, match="packed weights for experts only"):
        read(**{name: quantize(complete[name])})

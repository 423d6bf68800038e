"""Qwen3-MoE with what its configuration may ask for besides: YaRN for long contexts, and biases of the attention."""

from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.quant.checkpoint import load_model
from speedstack.runtime import Engine
from tests.packing import save_packed
from tests.random_values import randomize

NUM_TOKENS = 70  # past the original length of the stretched embedding
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 32}
# As Qwen's documentation has users write it into a config.json of before transformers 5.
OLD_YARN = {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}


def build_model(**overrides: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields: dict[str, Any] = {
        **{"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        **{"num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 128, "eos_token_id": None},
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(fields | overrides)))
    randomize(model, seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, 200, (NUM_TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16, "truncate": False}},
        OLD_YARN,
        {"attention_bias": True},
        {"attention_bias": True, "rope_parameters": YARN},
    ],
    ids=["yarn", "every key of yarn", "old spelling", "biases", "both"],
)
def test_logits_equal_transformers(fields: dict[str, Any], ids: list[int], tmp_path: Path) -> None:
    model = build_model(**fields)
    with torch.no_grad():
        expected_TV = model(torch.tensor([ids])).logits[0]
        changed_TV = build_model()(torch.tensor([ids])).logits[0]
    model.save_pretrained(tmp_path / "plain")
    found_TV = Engine.from_pretrained(tmp_path / "plain", backend="reference").logits(ids)
    # Sums in another order, in float32.
    torch.testing.assert_close(found_TV, expected_TV, atol=2e-5, rtol=2e-5)
    assert (expected_TV - changed_TV).abs().max() > 1e-2, "the settings change nothing here"


def test_greedy_text_equals_transformers_with_packed_experts(ids: list[int], tmp_path: Path) -> None:
    save_packed(build_model(attention_bias=True, rope_parameters=YARN), tmp_path / "packed")
    model: Any = load_model(tmp_path / "packed")
    theirs = model.generate(torch.tensor([ids[:20]]), max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    engine = Engine.from_pretrained(tmp_path / "packed")
    assert engine.generate(ids[:20], max_new_tokens=40).tokens == theirs


def test_a_rotary_embedding_that_is_not_computed_is_refused_by_name(tmp_path: Path) -> None:
    build_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rotary type 'dynamic' of attention is not supported"):
        Engine.from_pretrained(tmp_path)

"""gpt-oss in the reference backend: equal to transformers, packed or not; refused by name elsewhere."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.quant.checkpoint import load_checkpoint, load_model
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.cpu.backend import CpuBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.rope import rotary_tables
from speedstack.runtime.model.spec import ModelSpec, MoeSpec, YarnSpec
from speedstack.runtime.model.weights import read_weights
from tests.packing import save_packed
from tests.random_values import randomize

NUM_TOKENS = 90  # more than five windows of 16; three prompt chunks of 32
CPU = torch.device("cpu")


def build_model(**overrides: Any) -> Any:
    """Two layers, sliding then full; every parameter random and large enough that the SwiGLU's clamp is reached."""
    from transformers import GptOssConfig, GptOssForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        "swiglu_limit": 1.5,
    }
    model = GptOssForCausalLM(GptOssConfig(**(fields | overrides)))
    randomize(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()


def run(backend: ReferenceBackend, ids: list[int], chunk: int) -> torch.Tensor:
    parts = []
    for first in range(0, len(ids), chunk):
        tokens = ids[first : first + chunk]
        rows = Rows(tokens, [0] * len(tokens), list(range(first, first + len(tokens))))
        parts.append(backend.step(rows, range(len(tokens)))[0].clone())
    return torch.cat(parts)


def reference(spec: ModelSpec, tensors: dict[str, Any]) -> ReferenceBackend:
    return ReferenceBackend(read_weights(spec, tensors, torch.float32, CPU, tied=False), None, 1, 128)


def test_logits_equal_transformers(ids: list[int]) -> None:
    model = build_model()
    with torch.no_grad():
        expected_TV = model(torch.tensor([ids])).logits[0]
    spec = spec_from_config(model.config)
    got_TV = run(reference(spec, dict(model.state_dict())), ids, 32)
    # float32 sums of up to 64 terms in another order, through two layers; logits up to about 15
    torch.testing.assert_close(got_TV, expected_TV, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(reference(spec, dict(model.state_dict())), ids, 1), got_TV), "rows in other company"


def test_packed_logits_equal_transformers(ids: list[int], tmp_path: Path) -> None:
    save_packed(build_model(), tmp_path / "packed")
    checkpoint = load_checkpoint(tmp_path / "packed")
    assert isinstance(checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"], MXFP4Tensor)
    with torch.no_grad():
        expected_TV = load_model(tmp_path / "packed")(torch.tensor([ids])).logits[0]
    got_TV = run(reference(spec_from_config(checkpoint.config), checkpoint.tensors), ids, 32)
    # as above: both read the same packed values
    torch.testing.assert_close(got_TV, expected_TV, rtol=1e-4, atol=1e-4)


def test_bfloat16_errs_no_more_than_transformers_does(ids: list[int]) -> None:
    """Both round everywhere, at other places: what can be asked for is an error of the same size."""
    model = build_model()
    with torch.no_grad():
        exact_TV = model(torch.tensor([ids])).logits[0]
        theirs_TV = model.bfloat16()(torch.tensor([ids])).logits[0].float()
    tensors = dict(model.state_dict())
    weights = read_weights(spec_from_config(model.config), tensors, torch.bfloat16, CPU, tied=False)
    ours_TV = run(ReferenceBackend(weights, None, 1, 128), ids, 32)

    def error(logits_TV: torch.Tensor) -> float:
        return float((logits_TV - exact_TV).norm() / exact_TV.norm())

    # 8 bits of mantissa through two layers: about a per cent; the medians of two such errors differ by less than half
    assert 0.001 < error(theirs_TV) < 0.1
    assert error(ours_TV) < 1.5 * error(theirs_TV)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_greedy_text_equals_transformers_with_packed_experts(tmp_path: Path, backend: Any) -> None:
    save_packed(build_model(), tmp_path / "packed")
    engine = Engine.from_pretrained(tmp_path / "packed", backend=backend, max_batch_size=2, max_length=64)
    greedy = engine.generate([5, 6, 7], max_new_tokens=12).tokens
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model: Any = load_model(tmp_path / "packed")
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert greedy == expected[0, 3:].tolist()


def test_cpu_backend_computes_what_the_reference_computes() -> None:
    """Biases everywhere, YaRN, clamped SwiGLU, sinks on all layers; experts not packed."""
    model = build_model()
    weights = read_weights(spec_from_config(model.config), dict(model.state_dict()), torch.float32, CPU, tied=False)
    rows = Rows(list(range(5, 45)), [0] * 40, list(range(40)))
    logits = [kind(weights, None, 1, 64).step(rows, range(40))[0].clone() for kind in (ReferenceBackend, CpuBackend)]
    # float32 sums in another order
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=3e-5)


def test_gpt_oss_as_released() -> None:
    """The defaults of the transformers config are gpt-oss-120b (its model card, table 1)."""
    from transformers import GptOssConfig

    spec = spec_from_config(GptOssConfig())
    sliding, full = spec.layers[0].attention, spec.layers[1].attention
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (36, 2880, 201088)
    assert (sliding.num_heads, sliding.num_kv_heads, sliding.qk_head_dim) == (64, 8, 64)
    assert (sliding.window, full.window, full.has_sinks, full.has_bias) == (128, None, True, True)
    # 0.1 ln 32 + 1, YaRN eq. 22
    assert full.yarn == YarnSpec(32.0, 4096, 32.0, 1.0, False, 0.1 * math.log(32) + 1)
    assert spec.layers[0].mlp == MoeSpec(128, 4, 2880, "softmax", False, True, 1.0, True, 7.0, 1.702)


@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_tables_equal_transformers(truncate: bool) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    config = build_model(
        head_dim=64,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "truncate": truncate,
            "original_max_position_embeddings": 4096,
        },
    ).config
    expected = GptOssRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])
    got = rotary_tables(spec_from_config(config).layers[1].attention, 300, CPU)
    for table, wanted in zip(got, expected, strict=True):
        # the same float32 operations in another order: an angle of 300 radians has an ulp of 3e-5
        torch.testing.assert_close(table, wanted[0], rtol=0, atol=1e-4)


def test_other_stretches_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rotary type 'llama3'"):
        spec_from_config(_with_rope({"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="mscale"):
        spec_from_config(_with_rope(yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}))


def _with_rope(parameters: dict[str, Any]) -> Any:
    config = build_model().config
    config.rope_parameters = parameters
    return config

"""Random weights have the layout of a loaded checkpoint, the variance they promise, and rows apart from each other."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.quant.checkpoint import load_checkpoint
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.reference import rms_norm
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.moe import route
from speedstack.runtime.model.released_models import MODELS, tiny_config
from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.synthetic_weights import random_weights
from speedstack.runtime.model.weights import DenseWeights, MoeWeights, read_weights
from speedstack.runtime.perf.cost import active_experts
from tests.packing import save_packed

CPU = torch.device("cpu")


def layout(value: Any) -> Any:
    """Types, shapes, dtypes and strides, without values."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if isinstance(value, MXFP4Tensor):
        return "MXFP4", layout(value.codes), layout(value.scales)
    if isinstance(value, list):
        return [layout(each) for each in value]
    if is_dataclass(value):
        return type(value).__name__, {field.name: layout(getattr(value, field.name)) for field in fields(value)}
    return value


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_packed", [True, False])
def test_layout_is_that_of_a_checkpoint(model: str, is_packed: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(model)
    made = AutoModelForCausalLM.from_config(config)
    if is_packed:
        save_packed(made, tmp_path)
    else:
        made.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    spec = spec_from_config(checkpoint.config)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = read_weights(spec, dict(checkpoint.tensors), dtype, CPU, tied=False)
        drawn = random_weights(spec, dtype, CPU, is_packed)
        for name in ("embedding_VD", "norm_D", "lm_head_VD", "layers"):
            assert layout(getattr(drawn, name)) == layout(getattr(loaded, name)), name


def middling() -> Any:
    """Qwen3-MoE wide enough for statistics: 64 experts, 4 a row, 6 layers."""
    config = tiny_config("qwen3-30b-a3b")
    spec = spec_from_config(config)
    moe = spec.layers[0].mlp
    assert isinstance(moe, MoeSpec)
    moe = replace(moe, num_experts=64, top_k=4, intermediate_size=64)
    return replace(spec, hidden_size=256, layers=(replace(spec.layers[0], mlp=moe),) * 6)


def test_packed_values_have_the_variance_of_plain_ones() -> None:
    weights = random_weights(middling(), torch.float32, CPU, is_packed=True)
    plain = random_weights(middling(), torch.float32, CPU, is_packed=False)
    for layer, other in zip(weights.layers, plain.layers, strict=True):
        assert isinstance(layer.mlp, MoeWeights) and isinstance(other.mlp, MoeWeights)
        for name in ("gate_up_EID", "down_EDI"):
            packed, wanted = getattr(layer.mlp, name), getattr(other.mlp, name)
            assert len(packed.codes.unique()) == 256
            # A scale is a power of two, so that the deviation is right to a factor of sqrt(2) either way.
            assert 2**-0.5 <= packed.dequantize().std() / wanted.std() <= 2**0.5, name
    drawn = weights.embedding_VD
    assert torch.equal(drawn, random_weights(middling(), torch.float32, CPU, is_packed=True).embedding_VD), (
        "the same seed draws the same"
    )
    assert not torch.equal(drawn, random_weights(middling(), torch.float32, CPU, True, seed=1).embedding_VD)


def test_rows_choose_their_experts_independently() -> None:
    """Eight rows, over 40 contexts: as many different experts as independent uniform draws give, in every layer."""
    from speedstack.runtime.backends.base import Rows
    from speedstack.runtime.backends.gpu.expected_buffers import expected_buffers
    from speedstack.runtime.backends.reference import ReferenceBackend

    spec = middling()
    weights = random_weights(spec, torch.float32, CPU, is_packed=True)
    backend = ReferenceBackend(weights, None, 1, 128)
    for cache in backend.caches:
        cache.k_SLGH.normal_(generator=torch.Generator().manual_seed(1))
        cache.v_SLGH.normal_(generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    counts = torch.zeros(spec.num_layers)
    for _ in range(40):
        tokens = torch.randperm(spec.vocab_size, generator=generator)[:8].tolist()
        seen = expected_buffers(backend, Rows(tokens, [0] * 8, list(range(100, 108))))
        for layer in range(spec.num_layers):
            mlp = spec.layers[layer].mlp
            assert isinstance(mlp, MoeSpec)
            counts[layer] += len(route(seen[f"L{layer:02d}.router"], None, mlp)[0].unique()) / 40
    expected = active_experts(64, 4, 8)
    assert (counts / expected - 1).abs().max() < 0.1, f"{counts.tolist()} different experts, expected {expected:.1f}"


def test_values_of_a_step_stay_near_one() -> None:
    spec = spec_from_config(tiny_config("mimo-v2-flash"))
    weights = random_weights(spec, torch.float32, CPU, is_packed=True)
    assert isinstance(weights.layers[0].mlp, DenseWeights)
    from speedstack.runtime.backends.base import Rows
    from speedstack.runtime.backends.reference import ReferenceBackend

    backend = ReferenceBackend(weights, None, 1, 32)
    logits_WV, _ = backend.step(Rows(list(range(8)), [0] * 8, list(range(8))), range(8))
    assert 0.5 < rms_norm(logits_WV, torch.ones(()), 0.0).std() < 1.5 and 0.5 < logits_WV.std() < 2

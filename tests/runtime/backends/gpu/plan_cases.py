"""Tiny models of three families, and every buffer of a step as the reference backend has it, for tests of plans.

Kernels take float32 where they are interpreted and bfloat16 on a GPU. There the reference computes in float32 what
bfloat16 holds of the same weights, and errors are a share of a row's norm.

Legend: R rows, D hidden, V vocabulary, G key/value heads, K choices of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from speedstack.eval.gpu_suite.correctness import TOLERANCE, row_error, widened
from speedstack.eval.gpu_suite.near_ties import decided_rows
from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor, quantize
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.base import PlanBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec, YarnSpec
from speedstack.runtime.model.synthetic_weights import empty_weights
from speedstack.runtime.model.weights import ModelWeights, plain_matrix

CPU = torch.device("cpu")
MAX_LENGTH, NUM_SLOTS, NUM_ROWS = 64, 3, 4
LOST = 69  # a token of which one test takes the embedding away

# Every ingredient of the three families at sizes that fill no tile: three heads a group, a hidden size that is no
# multiple of a chunk, a last tile that is cut.
MIMO = (
    LayerSpec(AttentionSpec(6, 2, 24, 20, 9, 5e5), DenseSpec(40)),
    LayerSpec(
        AttentionSpec(6, 2, 24, 20, 8, 1e4, window=9, has_sinks=True, value_scale=0.7),
        MoeSpec(5, 2, 24, "sigmoid", True, True, routed_scale=1.5),
    ),
)
QWEN3 = (
    LayerSpec(
        AttentionSpec(4, 1, 16, 16, 16, 1e4, has_qk_norm=True),
        MoeSpec(6, 3, 32, "softmax", has_correction_bias=False, renormalize=False),
    ),
)
# What its configuration may ask for besides: long contexts by YaRN, and biases, which come before the norms.
QWEN3_LONG = replace(QWEN3[0].attention, has_bias=True, yarn=YarnSpec(4.0, 16, 32.0, 1.0, True, 1.14))
GPT_OSS = (
    LayerSpec(
        AttentionSpec(
            2, 2, 16, 16, 16, 1.5e5, window=12, has_sinks=True, has_bias=True,
            yarn=YarnSpec(8.0, 32, 32.0, 1.0, False, 1.2),
        ),
        MoeSpec(4, 2, 32, "softmax", False, True, has_bias=True, swiglu_limit=0.7, swiglu_alpha=1.702),
    ),
)  # fmt: skip


# Rows of projections that begin anywhere in tiles of 128, so that what shares a scale is 16 rows, grouped 4; a dense
# layer's up rows behind a cut tile: 2 rows; three chunks of the hidden size, the last one cut.
FP8 = (
    LayerSpec(AttentionSpec(6, 2, 24, 20, 9, 5e5), DenseSpec(150)),
    LayerSpec(replace(MIMO[1].attention, value_scale=1.0), replace(MIMO[1].mlp, intermediate_size=32)),
)


def build(
    layers: Sequence[LayerSpec], hidden_size: int, is_packed: bool, vocab_size: int = LOST + 1, has_fp8: bool = False
) -> ModelWeights:
    """Random float32 weights, large enough that nothing is near zero and the SwiGLU's clamp is reached."""
    spec = ModelSpec("test", vocab_size, hidden_size, 1e-5, MAX_LENGTH, (), tuple(layers))
    weights = empty_weights(spec, torch.float32, CPU, is_packed, has_fp8)
    generator = torch.Generator().manual_seed(0)

    def fill(owner: Any) -> None:
        for name, value in vars(owner).items():
            if isinstance(value, MXFP4Tensor):
                plain = torch.randn(value.shape, generator=generator) * 0.2
                setattr(owner, name, quantize(plain))
            elif isinstance(value, FP8Tensor):
                value.codes_OI.copy_(torch.randn(value.shape, generator=generator) * 100)
                value.scales_PQ.uniform_(0.0005, 0.0015, generator=generator)
            elif isinstance(value, torch.Tensor):
                is_norm = "norm" in name
                value.uniform_(0.8, 1.2, generator=generator) if is_norm else value.normal_(0, 0.2, generator=generator)

    fill(weights)
    for layer in weights.layers:
        fill(layer.attention)
        fill(layer.mlp)
    return weights


def dequantized(weights: ModelWeights) -> ModelWeights:
    """The same weights without FP8."""

    def plain(owner: Any) -> Any:
        dtype = weights.embedding_VD.dtype
        fp8 = {name: value for name, value in vars(owner).items() if isinstance(value, FP8Tensor)}
        return replace(owner, **{name: plain_matrix(value, dtype) for name, value in fp8.items()})

    layers = [replace(layer, attention=plain(layer.attention), mlp=plain(layer.mlp)) for layer in weights.layers]
    return replace(plain(weights), layers=layers)


CASES: dict[str, Callable[[], ModelWeights]] = {
    "mimo": lambda: build(MIMO, 72, False),
    "qwen3-mxfp4": lambda: build((replace(QWEN3[0], attention=QWEN3_LONG),), 96, True),
    "gpt-oss-mxfp4": lambda: build(GPT_OSS, 64, True),
    "mimo-fp8-mxfp4": lambda: build(FP8, 288, True, vocab_size=150, has_fp8=True),
}


# The same families with as few items as show every kind of phase, for many schedules.
SMALL_LENGTH = 32
SMALL_CASES: dict[str, Callable[[], ModelWeights]] = {
    "mimo": lambda: build((LayerSpec(replace(MIMO[1].attention, num_heads=2), MIMO[1].mlp),), 40, False, 24),
    "dense": lambda: build((LayerSpec(AttentionSpec(2, 1, 16, 16, 8, 1e4), DenseSpec(40)),), 40, False, 24),
    "qwen3-mxfp4": lambda: build(
        (replace(QWEN3[0], attention=replace(QWEN3[0].attention, num_heads=2)),), 32, True, 24
    ),
    "gpt-oss-mxfp4": lambda: build(GPT_OSS, 32, True, 24),
    "fp8": lambda: build(
        (LayerSpec(AttentionSpec(2, 1, 16, 16, 8, 1e4), DenseSpec(40)),), 136, False, 24, has_fp8=True
    ),
}


def placed(weights: ModelWeights, device: torch.device) -> ModelWeights:
    """The weights on the device, in the dtype that kernels take there; routers stay in float32."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def there(owner: Any) -> Any:
        moved: dict[str, Any] = {}
        for name, value in vars(owner).items():
            if isinstance(value, MXFP4Tensor | FP8Tensor):
                moved[name] = value.to(device)
            elif isinstance(value, torch.Tensor):
                is_exact = name in ("router_ED", "router_bias_E", "correction_bias_E")
                moved[name] = value.to(device, value.dtype if is_exact else dtype)
        return replace(owner, **moved)

    layers = [replace(layer, attention=there(layer.attention), mlp=there(layer.mlp)) for layer in weights.layers]
    return replace(there(weights), layers=layers)


def prefilled(
    weights: ModelWeights, lengths: Sequence[int], max_length: int = MAX_LENGTH
) -> tuple[ReferenceBackend, list[list[int]]]:
    """A reference backend whose slots hold sequences of these lengths, and NaN wherever nothing was written."""
    backend = ReferenceBackend(
        weights if weights.dtype == torch.float32 else widened(weights), None, NUM_SLOTS, max_length
    )
    for cache in backend.caches:
        cache.k_SLGH.fill_(float("nan"))
        cache.v_SLGH.fill_(float("nan"))
    generator = torch.Generator().manual_seed(1)
    num_known = min(LOST, weights.spec.vocab_size)
    ids = [torch.randint(0, num_known, (max_length,), generator=generator).tolist() for _ in lengths]
    for slot, length in enumerate(lengths):
        if length:
            backend.step(Rows(ids[slot][:length], [slot] * length, list(range(length))), [])
    return backend, ids


def fill(backend: PlanBackend, reference: ReferenceBackend) -> None:
    """The same contexts as the reference's, and NaN in every buffer that a step has to write before it reads."""
    for cache, wanted in zip(backend.memory.caches, reference.caches, strict=True):
        both_SLGH = torch.cat([wanted.k_SLGH, wanted.v_SLGH], dim=-1)
        cache.copy_(both_SLGH[:NUM_SLOTS].permute(2, 0, 1, 3))
    for buffer in backend.memory.buffers.values():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared where numbers have to be the same, NaN too."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def rows_of(ids: list[list[int]], *places: tuple[int, int]) -> Rows:
    """Rows at (slot, position)."""
    return Rows([ids[s][p] for s, p in places], [s for s, _ in places], [p for _, p in places])


def check_caches(backend: PlanBackend, reference: ReferenceBackend) -> None:
    """Keys and values are the reference's, and what was not written is what it was."""
    for cache, wanted in zip(backend.memory.caches, reference.caches, strict=True):
        both = torch.cat([wanted.k_SLGH, wanted.v_SLGH], dim=-1)[:NUM_SLOTS].permute(2, 0, 1, 3)
        if cache.dtype == torch.float32:
            # float32 sums of up to 96 terms in another order
            torch.testing.assert_close(cache, both, rtol=1e-4, atol=3e-5, equal_nan=True)
            continue
        assert torch.equal(cache.isnan(), both.isnan())
        error = (cache.float() - both).nan_to_num().norm() / both.nan_to_num().norm()
        assert error <= TOLERANCE[cache.dtype], f"keys and values are off by {error:.2e} of their norm"


def check_text(model: Path, name: str) -> None:
    """An engine with the backend `name` writes what one with the reference backend does."""
    tokens = {}
    for backend in ("reference", name):
        engine = Engine.from_pretrained(model, backend=backend, max_length=32, max_batch_size=1)  # type: ignore[arg-type]
        assert engine.backend_name == backend
        tokens[backend] = engine.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).tokens
    assert tokens[name] == tokens["reference"] and len(set(tokens[name])) > 1


def assert_buffers_close(
    found: torch.Tensor, expected: torch.Tensor, name: str, decided_R: torch.Tensor | None = None
) -> None:
    """Equal but for the order of float32 sums, of which `name` is told where they are not.

    Sums of up to 288 terms through at most two layers: what is left of large terms that cancel has their error, not its
    own, so the bound beside the relative one is a share of the buffer's largest value. With `decided_R`, of bfloat16:
    rows [R] whose choice of experts roundings do not change differ by no more than those.
    """
    if decided_R is not None:
        error = row_error(found, expected, decided_R)
        assert error <= TOLERANCE[torch.bfloat16], f"{name} is off by {error:.2e} of a row's norm"
        return
    largest = expected.nan_to_num(0.0).abs().max().item() if expected.is_floating_point() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=4e-6 * largest, msg=lambda text: f"{name}: {text}")


def decided(
    reference: ReferenceBackend, expected: dict[str, torch.Tensor], device: torch.device
) -> torch.Tensor | None:
    """For `assert_buffers_close`; None where kernels compute in float32: in these models no choice is close in it."""
    if device.type == "cpu":
        return None
    decided_R = decided_rows(reference.weights, expected, TOLERANCE[torch.bfloat16])
    assert decided_R.any(), "no row's choice of experts is clear of roundings: give the test other tokens"
    return decided_R

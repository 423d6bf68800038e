"""Backends: equal to transformers and to each other, and a row's bits its own.

Legend: T tokens, V vocabulary, R rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.quant.checkpoint import load_checkpoint
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.base import Backend, DraftRequest, Rows
from speedstack.runtime.backends.cpu.backend import CpuBackend
from speedstack.runtime.backends.cpu.drafter import CompiledDrafter
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.kv_ring import MAX_ROWS, ring_length
from speedstack.runtime.model.weights import ModelWeights, plain_matrix, read_weights

NUM_TOKENS = 150  # two prompt chunks and more than nine windows of 16
Make = Callable[..., Backend]


def weights_of(path: Path, unpack: bool = False) -> ModelWeights:
    checkpoint = load_checkpoint(path)
    tensors = dict(checkpoint.tensors)
    if unpack:
        tensors = {k: t.dequantize() if isinstance(t, MXFP4Tensor) else t for k, t in tensors.items()}
    spec = spec_from_config(checkpoint.config)
    return read_weights(spec, tensors, torch.float32, torch.device("cpu"), tied=False)


@pytest.fixture(params=[CpuBackend, ReferenceBackend], ids=["cpu", "reference"])
def make(request: pytest.FixtureRequest) -> Make:
    def build(weights: ModelWeights, drafter: Any = None, num_slots: int = 3, max_length: int = 192) -> Backend:
        return request.param(weights, drafter, num_slots, max_length)

    return build


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()


def run(backend: Backend, ids: list[int], slot: int = 0, start: int = 0, chunk: int = MAX_ROWS) -> torch.Tensor:
    """Logits [T, V] of a sequence, `chunk` rows a step."""
    parts = []
    for first in range(0, len(ids), chunk):
        tokens = ids[first : first + chunk]
        rows = Rows(tokens, [slot] * len(tokens), list(range(start + first, start + first + len(tokens))))
        logits_TV, best = backend.step(rows, range(len(tokens)))
        assert best == logits_TV.argmax(-1).tolist()
        parts.append(logits_TV.clone())
    return torch.cat(parts)


def poison(backend: Backend) -> None:
    """Fills every key/value buffer with values that no forward pass makes."""
    if isinstance(backend, CpuBackend):
        buffers = list(backend._caches)
        if isinstance(backend.drafter, CompiledDrafter):
            buffers += backend.drafter._caches
    else:
        assert isinstance(backend, ReferenceBackend)
        buffers = [t for cache in backend.caches for t in (cache.k_SLGH, cache.v_SLGH)]
        contexts = backend.drafter.contexts if backend.drafter is not None else []
        buffers += [t for context in contexts for t in (context.keys_LTGH, context.values_LTGH)]
    for buffer in buffers:
        buffer.fill_(float("nan"))


def test_logits_equal_transformers_full_forward(make: Make, tiny_packed_dir: Path, ids: list[int]) -> None:
    from speedstack.quant.checkpoint import load_model

    with torch.no_grad():
        expected_TV = load_model(tiny_packed_dir)(torch.tensor([ids])).logits[0]
    got_TV = run(make(weights_of(tiny_packed_dir)), ids)
    # float32 sums of up to 96 terms in another order, through three layers of logits up to about 20
    torch.testing.assert_close(got_TV, expected_TV, rtol=1e-4, atol=1e-4)


def test_an_odd_rotary_size_equals_transformers(
    make: Make, make_tiny_model: Callable[..., Any], ids: list[int]
) -> None:
    # transformers' default: 0.334 of 64 dimensions are 21 by name and 22 rotated
    rope = {
        kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334}
        for kind in ("full_attention", "sliding_attention")
    }
    model = make_tiny_model(head_dim=64, rope_parameters=rope)
    with torch.no_grad():
        expected_TV = model(torch.tensor([ids])).logits[0]
    weights = read_weights(
        spec_from_config(model.config), dict(model.state_dict()), torch.float32, torch.device("cpu"), tied=False
    )
    # as above
    torch.testing.assert_close(run(make(weights), ids), expected_TV, rtol=1e-4, atol=1e-4)


def test_an_embedding_without_numbers_stays_in_its_own_row(make: Make, tiny_packed_dir: Path, ids: list[int]) -> None:
    weights = weights_of(tiny_packed_dir)
    weights.embedding_VD = weights.embedding_VD.clone()
    weights.embedding_VD[511] = float("nan")
    ids = [token % 511 for token in ids]
    backend = make(weights)
    expected_TV = run(make(weights), ids[:20])
    run(backend, ids[:18])
    logits_RV, best = backend.step(Rows([*ids[18:20], 511], [0] * 3, [18, 19, 20]), [0, 1, 2])
    assert torch.equal(logits_RV[:2], expected_TV[18:]) and best[2] == -1


def test_qwen3_moe_equals_transformers(make: Make, ids: list[int]) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=256,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
        expected_TV = model(torch.tensor([ids])).logits[0]
    tensors: dict[str, Any] = dict(model.state_dict())
    weights = read_weights(spec_from_config(config), tensors, torch.float32, torch.device("cpu"), tied=False)
    # float32 sums in another order; logits up to about 10
    torch.testing.assert_close(run(make(weights), ids), expected_TV, rtol=1e-4, atol=1e-4)


def test_a_row_has_the_same_bits_in_any_company(make: Make, tiny_packed_dir: Path, ids: list[int]) -> None:
    weights = weights_of(tiny_packed_dir)
    alone_TV = run(make(weights), ids, chunk=1)
    for chunk in (2, 3, 5, 8, 64):
        assert torch.equal(run(make(weights), ids, chunk=chunk), alone_TV), f"chunks of {chunk}"
    # Beside other sequences, in another slot, at another place in the step, in larger buffers
    backend = make(weights, num_slots=4, max_length=256)
    poison(backend)
    others = ids[::-1]
    for t in range(40):
        rows = Rows([others[t], others[t] + 1, ids[t], others[t]], [0, 1, 3, 2], [t, t, t, t])
        logits_RV, _ = backend.step(rows, [0, 2])
        assert torch.equal(logits_RV[1], alone_TV[t])


def test_threads_change_no_bit(tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, ids: list[int]) -> None:
    weights, num_threads = weights_of(tiny_packed_dir), torch.get_num_threads()
    drafter = load_drafter(tiny_packed_drafter_dir).float().eval()
    results, drafts = [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for chunk in (1, 7, 64):
                backend = CpuBackend(weights, drafter, 1, 192)
                results.append(run(backend, ids, chunk=chunk))
                drafts.append(backend.draft([DraftRequest(7, 0, NUM_TOKENS)], 7))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(draft == drafts[0] for draft in drafts)


def test_more_rows_and_drafts_than_fit_one_call(tiny_packed_dir: Path, tiny_packed_drafter_dir: Path) -> None:
    drafter = load_drafter(tiny_packed_drafter_dir).float().eval()
    backend = CpuBackend(weights_of(tiny_packed_dir), drafter, 12, 64)
    slots = [slot for slot in range(12) for _ in range(8)]
    rows = Rows([3 + 5 * slot % 97 + i for i, slot in enumerate(slots)], slots, list(range(8)) * 12)
    together_WV, _ = backend.step(rows, range(7, 96, 8))
    together_WV = together_WV.clone()
    drafts = backend.draft([DraftRequest(50 + slot, slot, 8) for slot in range(12)], 7)
    for slot in range(12):
        cut = slice(8 * slot, 8 * slot + 8)
        alone_1V, _ = backend.step(Rows(rows.tokens[cut], rows.slots[cut], rows.positions[cut]), [7])
        assert torch.equal(alone_1V[0], together_WV[slot])
        assert backend.draft([DraftRequest(50 + slot, slot, 8)], 7) == drafts[slot : slot + 1]


def test_packed_experts_compute_what_their_values_compute(tiny_packed_dir: Path, ids: list[int]) -> None:
    packed_TV = run(CpuBackend(weights_of(tiny_packed_dir), None, 1, 192), ids)
    plain_TV = run(CpuBackend(weights_of(tiny_packed_dir, unpack=True), None, 1, 192), ids)
    # The same values, but packed ones are summed block by block: float32 sums of up to 96 terms in another order.
    torch.testing.assert_close(packed_TV, plain_TV, rtol=1e-4, atol=3e-5)


def test_rejected_rows_leave_no_trace(make: Make, tiny_packed_dir: Path, ids: list[int]) -> None:
    weights = weights_of(tiny_packed_dir)
    expected_TV = run(make(weights), ids)
    backend = make(weights)
    poison(backend)
    got: list[torch.Tensor] = []
    position = 0
    while position < 100:
        # Every step carries seven wrong tokens behind one or two right ones; only the right ones are kept.
        keep = 1 + position % 2
        tokens = ids[position : position + keep] + [(token + 7) % 512 for token in ids[:7]]
        rows = Rows(tokens, [0] * len(tokens), list(range(position, position + len(tokens))))
        logits_RV, _ = backend.step(rows, range(keep))
        got.append(logits_RV.clone())
        position += keep
    assert torch.equal(torch.cat(got), expected_TV[:position])


def test_logits_that_are_nan_are_named(make: Make, tiny_packed_dir: Path) -> None:
    weights = weights_of(tiny_packed_dir)
    weights.norm_D = torch.full_like(weights.norm_D, float("nan"))
    assert make(weights).step(Rows([5], [0], [0]), [0])[1] == [-1]


def test_drafts_equal_the_drafter_model(
    make: Make, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, ids: list[int]
) -> None:
    weights, drafter = weights_of(tiny_packed_dir), load_drafter(tiny_packed_drafter_dir).bfloat16().float().eval()
    # The compiled backend drafts with matrices in bfloat16; here they hold nothing that rounding would change.
    weights.lm_head_VD = plain_matrix(weights.lm_head_VD, torch.float32).bfloat16().float()
    oracle = ReferenceBackend(weights, drafter, 2, 192)
    backend = make(weights, drafter, num_slots=2)
    poison(backend)
    for start in range(0, 60, 20):
        chunk = ids[start : start + 20]
        for slot, tokens in ((0, chunk), (1, chunk[::-1])):
            rows = Rows(tokens, [slot] * 20, list(range(start, start + 20)))
            oracle.step(rows, [])
            backend.step(rows, [])
        # Two sequences at once, then one again: a block's own keys and values must not stay behind.
        together = [DraftRequest(7, 0, start + 20), DraftRequest(9, 1, start + 20)]
        for requests in (together, together[:1]):
            drafts = backend.draft(requests, 7)
            for got, expected in zip(drafts, oracle.draft(requests, 7), strict=True):
                assert got.tokens == expected.tokens
                # float32 sums in another order, through two layers and an exponential
                assert got.probabilities == pytest.approx(expected.probabilities, rel=1e-4)
            assert backend.draft(requests, 3)[0].tokens == oracle.draft(requests, 3)[0].tokens


def test_rings_hold_a_window_and_a_step() -> None:
    assert ring_length(None, 100) == 112
    assert ring_length(16, 4096) == 80
    assert ring_length(128, 100) == 112


def test_sizes_the_kernels_cannot_take_are_refused_by_name(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model(head_dim=40)
    tensors: dict[str, Any] = dict(model.state_dict())
    weights = read_weights(spec_from_config(model.config), tensors, torch.float32, torch.device("cpu"), tied=False)
    with pytest.raises(ValueError, match=r"query/key head size that is a multiple of 16, not 40"):
        CpuBackend(weights, None, 1, 64)

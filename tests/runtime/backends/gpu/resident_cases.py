"""Backends and runs that the tests of the resident kernel share."""

from typing import Any

import torch

from speedstack.runtime.backends.base import RoundsRequest, Rows
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.weights import ModelWeights
from tests.runtime.backends.gpu.plan_cases import (
    CPU,
    NUM_SLOTS,
    SMALL_CASES,
    SMALL_LENGTH,
    bits_of,
    fill,
    placed,
    prefilled,
    rows_of,
)

SPLIT = 16


def resident_of(
    weights: ModelWeights, reference: ReferenceBackend, num_programs: int, **options: Any
) -> ResidentBackend:
    backend = ResidentBackend(
        weights, None, NUM_SLOTS, reference.max_length, split_size=SPLIT, num_programs=num_programs, **options
    )
    fill(backend, reference)
    return backend


def outcome(backend: ResidentBackend, start: tuple[list[torch.Tensor], Rows], num_steps: int) -> tuple[Any, ...]:
    """Tokens, logits and caches after some steps without the host, from the same contexts every time."""
    caches, rows = start
    for cache, was in zip(backend.memory.caches, caches, strict=True):
        cache.copy_(was)
    backend.memory.outbox.zero_()  # nothing is right because an earlier run left it there
    requests = [
        RoundsRequest([0] * position + [token], slot, SMALL_LENGTH, False, draw=draw)
        for token, slot, position, draw in zip(
            rows.tokens, rows.slots, rows.positions, rows.draws or [None] * len(rows.tokens), strict=True
        )
    ]
    assert backend.rounds is not None
    rounds = backend.rounds.run(requests, num_steps)
    tokens = [[one.tokens[0] for one in step] for step in zip(*rounds, strict=True)]
    logits_RV = backend.memory.logits_VR[:, : len(rows.tokens)].T.clone()
    return tokens, logits_RV, [cache.clone() for cache in backend.memory.caches]


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Bit for bit, what is NaN too."""
    pairs = [(a[1], b[1]), *zip(a[2], b[2], strict=True)]
    return a[0] == b[0] and all(torch.equal(bits_of(x), bits_of(y)) for x, y in pairs)


def small(
    case: str, num_programs: int, device: torch.device = CPU, **options: Any
) -> tuple[ResidentBackend, tuple[list[torch.Tensor], Rows]]:
    """A backend for a smaller model of the family, and where its runs start."""
    weights = placed(SMALL_CASES[case](), device)
    reference, ids = prefilled(weights, [17, 6], SMALL_LENGTH)
    backend = resident_of(weights, reference, num_programs, num_rows=2, **options)
    return backend, ([cache.clone() for cache in backend.memory.caches], rows_of(ids, (0, 17), (1, 6)))

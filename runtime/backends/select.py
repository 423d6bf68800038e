"""Selection of an engine's backend."""

import logging

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.base import Backend
from speedstack.runtime.backends.cpu.backend import AS_STORED, CpuBackend, HeldAs
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.weights import ModelWeights

logger = logging.getLogger("speedstack.runtime")

BACKENDS = ("auto", "reference", "cpu", "graph", "resident")


def make_backend(
    name: str,
    weights: ModelWeights,
    drafter: DFlashDraftModel | None,
    num_slots: int,
    max_length: int,
    held: HeldAs = AS_STORED,
) -> Backend:
    """The named backend; `auto` tries `cpu` on a CPU and falls back to `reference` with a warning.

    On a GPU `auto` is `reference`: `graph` and `resident` have not been measured on one. Raises ValueError, with the
    reason, for an unknown name or a model that the backend cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; use {', '.join(BACKENDS)}")
    if name == "cpu" or (name == "auto" and weights.embedding_VD.device.type == "cpu"):
        try:
            backend: Backend = CpuBackend(weights, drafter, num_slots, max_length, held)
        except ValueError as reason:
            if name == "cpu" or held != AS_STORED:
                raise
            logger.warning("backend auto: reference, because %s", reason)
        else:
            logger.info("backend %s: cpu, compiled kernels", name)
            return backend
    weights = weights.widened()
    if held != AS_STORED:
        raise ValueError("dense_dtype and kv_dtype are options of backend 'cpu'; others compute in the engine's dtype")
    for kind in (GraphBackend, ResidentBackend):
        if name == kind.name:
            return kind(weights, drafter, num_slots, max_length)
    return ReferenceBackend(weights, drafter, num_slots, max_length)

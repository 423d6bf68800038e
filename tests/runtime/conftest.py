"""Fixtures of several files: about drafting, and about Triton's interpreter."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.quant.checkpoint import load_checkpoint
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.weights import ModelWeights, plain_matrix, read_weights
from tests.random_values import randomize
from tests.runtime.strategy_cases import MakeDrafter


@pytest.fixture(scope="module")
def make_drafter(tiny_packed_drafter_dir: Path) -> MakeDrafter:
    """`make_drafter(seed, **options)`: a random drafter for `tiny_packed_dir` with these fields of its config."""

    def make(seed: int = 1, **options: Any) -> DFlashDraftModel:
        model = DFlashDraftModel(replace(load_drafter(tiny_packed_drafter_dir).config, **options))
        generator = randomize(model, seed)
        if model.config.draft_vocab_size is not None:
            ids = torch.randperm(model.config.vocab_size, generator=generator)[: model.config.draft_vocab_size]
            model.set_draft_vocab(ids.sort().values)
        return model.bfloat16().float().eval()

    return make


@pytest.fixture(scope="module")
def weights(tiny_packed_dir: Path) -> ModelWeights:
    checkpoint = load_checkpoint(tiny_packed_dir)
    spec = spec_from_config(checkpoint.config)
    found = read_weights(spec, dict(checkpoint.tensors), torch.float32, torch.device("cpu"), tied=False)
    # The compiled backend drafts with matrices in bfloat16; here they hold nothing that rounding would change.
    found.lm_head_VD = plain_matrix(found.lm_head_VD, torch.float32).bfloat16().float()
    return found


@pytest.fixture(autouse=True, scope="session")
def rows_of_interpreted_products_are_alike() -> Iterator[None]:
    """Under Triton's interpreter a product is NumPy's, and in BLAS the bits of a row depend on its place in a block.

    On a GPU they do not, and without BLAS neither: kernels promise so, and are tested for it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    class NumPy:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

        def matmul(self, a: Any, b: Any, dtype: Any = None) -> Any:
            return numpy.einsum("...ik,...kj->...ij", a, b, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "np", NumPy())
        yield

"""Drafters with options, random in every tensor."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashDraftModel
from tests.random_values import randomize


@pytest.fixture
def make_drafter(draft_config: DFlashConfig) -> Callable[..., DFlashDraftModel]:
    """`make_drafter(**options)`: a drafter whose every tensor is random; the same for the same options."""

    def make(**options: Any) -> DFlashDraftModel:
        model = DFlashDraftModel(dataclasses.replace(draft_config, target_sha256="a" * 64, **options)).eval()
        generator = randomize(model, seed=0)
        if model.config.draft_vocab_size is not None:
            ids = torch.randperm(model.config.vocab_size, generator=generator)[: model.config.draft_vocab_size]
            model.set_draft_vocab(ids.sort().values)
        return model

    return make

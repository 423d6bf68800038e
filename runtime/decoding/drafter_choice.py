"""Loads the drafter a user names: a directory, a model in memory, prompt lookup (`"ngram"`), or none."""

import copy
from pathlib import Path
from typing import Literal

import torch

from speedstack.dflash.checkpoint import MASK_EMBEDDING_NAME, check_target, load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.quant.checkpoint import weights_sha256
from speedstack.runtime.model.spec import ModelSpec
from speedstack.runtime.rounds.speculation import NGRAM

Drafter = DFlashDraftModel | Literal["ngram"] | None


def load_drafter_for(
    drafter: str | Path | DFlashDraftModel | None,
    spec: ModelSpec,
    target_sha256: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Drafter, str | None]:
    """The drafter for this target, in eval mode, and the SHA-256 of its weights if they are on disk.

    A model in memory is copied. Raises ValueError for a drafter made for another target.
    """
    if drafter is None:
        return None, None
    if isinstance(drafter, str | Path) and str(drafter) == NGRAM:
        return NGRAM, None
    model = copy.deepcopy(drafter) if isinstance(drafter, DFlashDraftModel) else load_drafter(drafter)
    check_target(model.config, target_sha256, spec.hidden_size, spec.num_layers, spec.vocab_size)
    sha256 = None if isinstance(drafter, DFlashDraftModel) else weights_sha256(drafter, [MASK_EMBEDDING_NAME])
    return model.to(device, dtype).eval().requires_grad_(False), sha256

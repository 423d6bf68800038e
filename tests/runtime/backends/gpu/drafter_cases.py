"""Tiny drafters for tiny targets, and rounds in which the host drafts with them: what plans with a drafter are held to.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.base import DraftRequest, RoundsRequest, Rows
from speedstack.runtime.backends.drafter_weights import DrafterWeights, read_drafter
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec
from speedstack.runtime.model.weights import ModelWeights
from tests.random_values import randomize
from tests.runtime.backends.gpu.plan_cases import MIMO, build

VOCAB_SIZE = 8  # few, so that a random drafter is right now and then
HIDDEN_SIZE = 40
MAX_LENGTH = 48
PROMPTS = [[5, 6, 1, 5, 6, 1, 5, 6, 2, 2, 0, 4, 1], [6, 2, 6, 2, 4, 6]]

# All that a plan has phases for: z-lab's drafter, MiMo's with a block that is not causal, and a causal window.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mimo": {
        "layer_types": ("sliding_attention", "full_attention"),
        "sliding_window": 3,
        "sliding_is_causal": False,
        "attention_sinks": True,
        "attention_value_scale": 0.7,
        "partial_rotary_factor": 0.5,
        "mask_embedding": True,
    },
    "causal, from the anchor": {
        "layer_types": ("full_attention", "sliding_attention"),
        "sliding_window": 2,
        "sample_from_anchor": True,
    },
}


def target() -> ModelWeights:
    """A dense layer with global attention and one with a window, sinks and experts, at sizes that fill no tile."""
    dense = LayerSpec(AttentionSpec(2, 1, 16, 16, 8, 1e4), DenseSpec(40))
    return build((dense, MIMO[1]), HIDDEN_SIZE, False, VOCAB_SIZE)


# Of drafters that are right now and then.
SEEDS = {"plain": 4, "mimo": 13, "causal, from the anchor": 9}


def drafter(options: str = "plain", **changes: Any) -> DFlashDraftModel:
    """Two layers with random weights, drafting four tokens or, from the anchor, five."""
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": VOCAB_SIZE,
        "mask_token_id": 7,
        "target_layer_ids": (1, 0),
        "num_target_layers": 2,
        "block_size": 5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }
    model = DFlashDraftModel(DFlashConfig(**fields | OPTIONS[options] | changes))
    randomize(model, SEEDS[options])
    return model.eval().requires_grad_(False)


def read(model: DFlashDraftModel) -> DrafterWeights:
    return read_drafter(model, torch.float32, torch.float32)


def prompt_steps(prompts: Sequence[list[int]], num_rows: int) -> list[Rows]:
    """What the host asks for to compute prompts, a slot each."""
    steps = []
    for slot, ids in enumerate(prompts):
        for start in range(0, len(ids), num_rows):
            chunk = ids[start : start + num_rows]
            steps.append(Rows(chunk, [slot] * len(chunk), list(range(start, start + len(chunk)))))
    return steps


class HostRounds:
    """Rounds of some sequences as the host makes them with the drafter in PyTorch, one at a time."""

    def __init__(self, weights: ModelWeights, model: DFlashDraftModel, prompts: Sequence[list[int]]) -> None:
        self.backend = ReferenceBackend(weights, model, len(prompts), MAX_LENGTH)
        self.texts = [list(prompt) for prompt in prompts]
        for rows in prompt_steps(prompts, 64):
            _, best = self.backend.step(rows, [len(rows.tokens) - 1])
            self.texts[rows.slots[0]].append(best[0])
        self.num_drafts = model.config.num_proposals

    def requests(self, ends: Sequence[int]) -> list[RoundsRequest]:
        return [
            RoundsRequest(list(text), slot, end, False, self.num_drafts)
            for slot, (text, end) in enumerate(zip(self.texts, ends, strict=True))
        ]

    def drafts(self, slot: int, end: int) -> list[int]:
        """What is proposed next."""
        text = self.texts[slot]
        count = min(self.num_drafts, end - len(text) - 1)
        if count < 1:
            return []
        return self.backend.draft([DraftRequest(text[-1], slot, len(text) - 1)], count)[0].tokens

    def round(self, slot: int, end: int) -> int:
        """Verifies that and commits; how many proposals stood."""
        text, drafts = self.texts[slot], self.drafts(slot, end)
        positions = list(range(len(text) - 1, len(text) + len(drafts)))
        _, best = self.backend.step(
            Rows([text[-1], *drafts], [slot] * len(positions), positions), range(len(positions))
        )
        accepted = next((i for i, token in enumerate(drafts) if token != best[i]), len(drafts))
        text += best[: accepted + 1]
        return accepted

"""Prompts, samplings and drafter options that the tests of drafting share."""

from collections.abc import Callable
from typing import Any

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime import Engine

NUM_NEW = 16
PROMPTS = [[10, 20, 30, 40], list(range(100, 170)), [400, 3, 99, 12, 12, 12, 5]]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-p and top-k": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
}
WINDOWS: dict[str, Any] = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 12}
MIMO: dict[str, Any] = {
    "layer_types": ("sliding_attention", "sliding_attention"),
    "sliding_window": 12,
    "sliding_is_causal": False,
    "attention_sinks": True,
    "attention_value_scale": 0.7,
    "partial_rotary_factor": 0.5,
    "mask_embedding": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "anchor slot": {"sample_from_anchor": True},
    "Markov head": {"markov_rank": 8},
    "pruned vocabulary": {"draft_vocab_size": 200},
    "causal windows": WINDOWS,
    "MiMo": MIMO,
    # Windows narrower than a block, an odd rank
    "everything": MIMO | {"sliding_window": 4, "sample_from_anchor": True, "markov_rank": 7, "draft_vocab_size": 200},
}
MakeDrafter = Callable[..., DFlashDraftModel]


def assert_same_text(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    """Together and alone, under every sampling."""
    for name, options in SAMPLING.items():
        together = engine.generate(PROMPTS, NUM_NEW, seed=3, ignore_eos=True, **options)
        assert [g.tokens for g in together] == expected[name], name
        alone = engine.generate(PROMPTS[2], NUM_NEW // 2, seed=3, ignore_eos=True, **options)
        assert alone.tokens == expected[name][2][: NUM_NEW // 2], name
        # What pays is measured: of an adaptive drafter nothing may.
        assert engine.strategy.is_adaptive or all(g.stats.num_drafted > 0 for g in (*together, alone))

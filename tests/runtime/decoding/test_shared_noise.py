"""Drafts from the target's own sampling noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.dflash.propose import Draft
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import DraftRequest
from speedstack.runtime.backends.torch_drafter import draft_scores
from speedstack.runtime.rounds.sampling import NoiseTable, SamplingParams, sample
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.strategy_cases import NUM_NEW, PROMPTS, SAMPLING, MakeDrafter


def test_shared_noise_samples_the_draft_as_the_target_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_V = torch.arange(97)
    for params in (SamplingParams(1.0), SamplingParams(0.7, top_k=9), SamplingParams(1.3, top_p=0.6, top_k=40)):
        for position in range(30):
            logits_V = torch.randn(97, generator=generator) * 3
            noise = NoiseTable(97, torch.device("cpu")).rows([(5, 6, position)])
            request = DraftRequest(0, 0, 0, params, noise)
            drafted = int(draft_scores(logits_V, request, 0, ids_V).argmax())
            assert drafted == sample(logits_V, noise[0], params)


@pytest.mark.parametrize("sampling", ["temperature 1", "top-p and top-k"])
def test_a_drafter_that_is_the_target_is_always_right_with_shared_noise(
    sampling: str, tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise of a proposal is that of the position it is for, in every sequence of a batch."""
    plain = Engine.from_pretrained(tiny_packed_dir, backend="cpu")
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW + 1, "ignore_eos": True} | SAMPLING[sampling]
    seeds = [3, 4, 5]
    texts = [plain.generate(p, seed=s, **options).tokens for p, s in zip(PROMPTS, seeds, strict=True)]
    whole = [prompt + tokens for prompt, tokens in zip(PROMPTS, texts, strict=True)]
    logits = [plain.logits(ids) for ids in whole]

    def draft(requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        drafts = []
        for request in requests:
            at = slice(request.position, request.position + 1)
            text = next(i for i, ids in enumerate(whole) if ids[at] == [request.anchor])
            rows = logits[text][request.position : request.position + num_drafts]
            scores = [draft_scores(row_V, request, i, torch.arange(512)) for i, row_V in enumerate(rows)]
            drafts.append(Draft([int(scores_V.argmax()) for scores_V in scores]))
        return drafts

    for noise, is_right in (("shared", True), ("none", False)):
        engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="cpu", draft_noise=noise)  # type: ignore[arg-type]
        monkeypatch.setattr(engine.backend, "draft", draft)
        found = engine.generate(PROMPTS, seed=seeds, **options)
        assert [g.tokens for g in found] == texts
        # One token of the prompt's pass, then two rounds of seven proposals and a bonus
        assert [g.stats.num_rounds == 2 for g in found] == [is_right] * 3


def test_shared_noise_of_a_pruned_vocabulary_is_that_of_its_tokens() -> None:
    logits_V = torch.randn(97, generator=torch.Generator().manual_seed(0))
    ids_U = torch.arange(0, 97, 3)
    noise = NoiseTable(97, torch.device("cpu")).rows([(5, 6, 7)])
    scores_U = draft_scores(logits_V[ids_U], DraftRequest(0, 0, 0, SamplingParams(1.0), noise), 0, ids_U)
    assert torch.equal(scores_U, (logits_V + noise[0])[ids_U])


def test_noise_of_a_position_is_drawn_once() -> None:
    table = NoiseTable(50, torch.device("cpu"))
    first = table.rows([(1, 2, 3), (1, 2, 4), (1, 2, 3)])
    assert first[0] is first[2] and not torch.equal(first[0], first[1])
    again = NoiseTable(50, torch.device("cpu")).rows([(1, 2, 4)])
    assert torch.equal(again[0], first[1]) and table.rows([(1, 2, 4)])[0] is first[1]


def test_greedy_proposals_ignore_noise(tiny_packed_dir: Path, make_drafter: MakeDrafter) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="cpu", draft_noise="shared")
    shared = engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True)
    engine.set_strategy(DraftStrategy())
    assert engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True).stats.num_rounds == shared.stats.num_rounds

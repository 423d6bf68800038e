"""Draft trees: the best of their size, by a brute-force search; chains; never worse than the chain they hold.

Legend: K positions, V vocabulary.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from speedstack.dflash.accept import accept
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import BlockScores
from speedstack.dflash.tree import Draft, best_chain, best_first_tree


class Table:
    """Log-probabilities of every position after every token, [K, V, V]; independent ones repeat along the middle."""

    def __init__(self, log_probabilities_KVV: torch.Tensor) -> None:
        self.table = log_probabilities_KVV

    def log_probabilities(self, depth: int, previous: int) -> torch.Tensor | None:
        found = self.table[depth, previous]
        return None if bool(torch.isnan(found).any()) else found

    def tokens(self, draft_ids: Sequence[int]) -> list[int]:
        return list(draft_ids)


def marginals(seed: int, depth: int, size: int, scale: float = 1.5) -> Table:
    logits_KV = torch.randn(depth, size, generator=torch.Generator().manual_seed(seed)) * scale
    return Table(logits_KV.log_softmax(-1)[:, None].expand(-1, size, -1))


def conditionals(seed: int, depth: int, size: int) -> Table:
    logits = torch.randn(depth, size, size, generator=torch.Generator().manual_seed(seed)) * 1.5
    return Table(logits.log_softmax(-1))


def prefixes(table: Table, anchor: int, depth: int, size: int) -> dict[tuple[int, ...], float]:
    """Every beginning of at most `depth` tokens with its probability."""
    found: dict[tuple[int, ...], float] = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(size), repeat=length):
            steps = zip(range(length), (anchor, *path[:-1]), path, strict=True)
            found[path] = math.exp(sum(float(table.table[at, previous, token]) for at, previous, token in steps))
    return found


def paths(draft: Draft) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@pytest.mark.parametrize("make", [marginals, conditionals])
@pytest.mark.parametrize("budget", [1, 5, 12, 30])
def test_a_tree_holds_the_most_probable_beginnings(make, budget: int) -> None:  # type: ignore[no-untyped-def]
    for seed in range(4):
        table = make(seed, 4, 5)
        draft = best_first_tree(table, anchor=3, depth=4, budget=budget)
        every = prefixes(table, 3, 4, 5)
        best = sorted(every, key=every.__getitem__, reverse=True)[:budget]
        assert len(draft.tokens) == budget
        assert set(paths(draft)) == set(best)
        # In the order of their probability, so that a leading part is the best smaller tree.
        assert paths(draft) == best
        for path, probability in zip(paths(draft), draft.probabilities, strict=True):
            parent = every[path[:-1]] if len(path) > 1 else 1.0
            assert probability == pytest.approx(every[path] / parent, rel=1e-4)


def test_a_chain_takes_the_best_token_of_each_position() -> None:
    table = conditionals(0, 6, 7)
    chain = best_chain(table, anchor=2, depth=5)
    previous = 2
    for depth, token in enumerate(chain.tokens):
        assert token == int(table.table[depth, previous].argmax())
        assert chain.probabilities[depth] == pytest.approx(float(table.table[depth, previous, token].exp()), rel=1e-5)
        previous = token
    assert chain.parents == [-1, 0, 1, 2, 3] and chain.depths() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [marginals, conditionals])
def test_a_tree_accepts_what_its_chain_accepts_and_more(make) -> None:  # type: ignore[no-untyped-def]
    """Texts drawn from the drafter's own distribution; the deepest tree is large enough to hold the whole chain."""
    generator = torch.Generator().manual_seed(1)
    totals = {"chain": 0, "small": 0, "large": 0}
    for seed in range(60):
        table = make(seed, 4, 4)
        drafts = {
            "chain": best_chain(table, 0, 4),
            "small": best_first_tree(table, 0, 4, 4),
            "large": best_first_tree(table, 0, 4, 4 + 4**2 + 4**3 + 4**4),
        }
        text: list[int] = []
        for depth in range(5):
            row = table.table[min(depth, 3), text[-1] if text else 0]
            text.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
        accepted = {}
        for name, draft in drafts.items():
            depths = [0, *draft.depths()]
            accepted[name] = len(accept(draft, [text[at] for at in depths[1:] + depths[:1]].__getitem__)[0])
            totals[name] += accepted[name]
        # Every beginning there is: every text is accepted whole.
        assert accepted["large"] == 4 >= accepted["chain"]
        held = set(paths(drafts["small"]))
        chain_in_tree = sum(path in held for path in paths(drafts["chain"]))
        assert accepted["small"] >= min(chain_in_tree, accepted["chain"])
    # As many rows as the chain, better spent.
    assert totals["small"] > totals["chain"]


def test_leading_and_within_are_trees_again() -> None:
    draft = best_first_tree(marginals(3, 4, 5), 0, 4, 20)
    for count in (0, 1, 7):
        assert paths(draft.leading(count)) == paths(draft)[:count]
    for depth in (0, 1, 2, 4):
        cut = draft.within(depth)
        assert paths(cut) == [path for path in paths(draft) if len(path) <= depth]
        assert len(cut.probabilities) == len(cut.tokens)


def test_scores_that_are_not_numbers_end_a_path() -> None:
    table = marginals(0, 4, 5)
    table.table = table.table.clone()
    table.table[2] = float("nan")
    assert len(best_chain(table, 0, 4).tokens) == 2
    assert max(best_first_tree(table, 0, 4, 30).depths()) == 2
    table.table[0] = float("nan")
    assert best_chain(table, 0, 4).tokens == [] == best_first_tree(table, 0, 4, 30).tokens


def test_impossible_tokens_are_not_proposed() -> None:
    table = marginals(0, 2, 5)
    table.table = table.table.clone()
    table.table[:, :, 2:] = -float("inf")
    assert sorted(paths(best_first_tree(table, 0, 2, 30))) == [(0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]


@pytest.mark.parametrize(("depth", "budget"), [(0, 5), (5, 0)])
def test_sizes_below_one_are_refused(depth: int, budget: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_first_tree(marginals(0, 4, 5), 0, depth, budget)


def test_block_scores_with_a_markov_head_follow_the_token_before(draft_config: DFlashConfig) -> None:
    config = replace(draft_config, markov_rank=6, draft_vocab_size=40)
    model = DFlashDraftModel(config).eval().requires_grad_(False)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(3)
    assert model.markov_head is not None
    model.markov_head.markov_w2.weight.normal_(0.0, 1.0, generator=generator)
    model.set_draft_vocab(torch.arange(0, 120, 3))
    hidden_KD = torch.randn(3, 64, generator=generator)
    head_VD = torch.randn(128, 64, generator=generator)
    scores = BlockScores(model, hidden_KD, model.draft_head(head_VD))
    for previous in (5, 77):
        expected_KU = model.logits(hidden_KD, torch.full((3,), previous), head_VD).log_softmax(-1)
        for depth in range(3):
            found = scores.log_probabilities(depth, previous)
            assert found is not None
            # float32: one row of a product sums in another order than three rows do
            torch.testing.assert_close(found, expected_KU[depth], rtol=1e-5, atol=1e-5)
    chain = best_chain(scores, 5, 3)
    assert all(token % 3 == 0 for token in chain.tokens)
    # Teacher-forced on its own tokens, the training logits propose the very chain that was drafted left to right.
    forced = model.logits(hidden_KD, torch.tensor([5, *chain.tokens[:-1]]), head_VD).argmax(-1)
    assert model.target_ids(forced).tolist() == chain.tokens


def test_block_scores_are_the_drafters_logits(drafter: DFlashDraftModel) -> None:
    hidden_KD = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    head_VD = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    scores = BlockScores(drafter, hidden_KD, head_VD)
    expected_KV = drafter.logits(hidden_KD, None, head_VD).log_softmax(-1)
    for depth in range(3):
        found = scores.log_probabilities(depth, previous=9)
        assert found is not None and torch.equal(found, expected_KV[depth])
        assert found is scores.log_probabilities(depth, previous=10)

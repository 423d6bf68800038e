"""Draft trees in the reference backend: a row's bits are those of a plain row, and the text stays the target's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.dflash.tree import Draft
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import DraftRequest, Rows
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.strategy_cases import MIMO, NUM_NEW, OPTIONS, PROMPTS, SAMPLING, MakeDrafter, assert_same_text


def branching(depth: int, seed: int) -> Draft:
    """A random tree of at most `depth`: every node follows a random earlier one."""
    generator = torch.Generator().manual_seed(seed)
    parents, depths = [-1], [1]
    while len(parents) < 19:
        parent = int(torch.randint(-1, len(parents), (1,), generator=generator))
        if (depths[parent] if parent >= 0 else 0) < depth:
            parents.append(parent)
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
    tokens = torch.randperm(500, generator=generator)[: len(parents)].tolist()
    return Draft(tokens, parents, [])


@pytest.mark.parametrize("start", [3, 70, 122], ids=["beginning", "ring wrapped", "two chunks of keys"])
def test_a_tree_row_has_the_bits_of_a_plain_row(start: int, weights: ModelWeights, make_drafter: MakeDrafter) -> None:
    ids = torch.randint(3, 512, (start + 1,), generator=torch.Generator().manual_seed(start)).tolist()
    drafter = make_drafter(**MIMO)
    backend = ReferenceBackend(weights, drafter, 3, 192)
    for buffer in (t for cache in backend.caches for t in (cache.k_SLGH, cache.v_SLGH)):
        buffer.fill_(float("nan"))

    def feed(one: ReferenceBackend, slot: int, tokens: Sequence[int], first: int = 0) -> torch.Tensor:
        rows = Rows(tokens, [slot] * len(tokens), list(range(first, first + len(tokens))))
        return one.step(rows, range(len(tokens)))[0]

    drafts = {0: branching(6, start), 2: branching(3, start + 1)}
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    anchors: dict[int, int] = {}
    for slot, draft in drafts.items():
        feed(backend, slot, ids[:start])
        anchors[slot] = anchor = len(tokens)
        tokens += [ids[start], *draft.tokens]
        slots += [slot] * (1 + len(draft.tokens))
        positions += [start, *(start + depth for depth in draft.depths())]
        parents += [-1, *(anchor + 1 + parent for parent in draft.parents)]
    tree_WV = backend.step(Rows(tokens, slots, positions, parents), range(len(tokens)))[0].clone()

    def path(draft: Draft, node: int) -> list[int]:
        return [] if node < 0 else [*path(draft, draft.parents[node]), node]

    plain = ReferenceBackend(weights, None, 1, 192)
    feed(plain, 0, ids[:start])
    for slot, draft in drafts.items():
        for node in range(-1, len(draft.tokens)):
            chain = [ids[start], *(draft.tokens[n] for n in path(draft, node))]
            assert torch.equal(feed(plain, 0, chain, start)[-1], tree_WV[anchors[slot] + 1 + node])
    # One path of each tree is committed; what follows is what follows the same tokens decoded plainly.
    chosen = {slot: path(draft, max(range(19), key=draft.depths().__getitem__)) for slot, draft in drafts.items()}
    backend.commit(
        [row for slot, nodes in chosen.items() for row in (anchors[slot], *(anchors[slot] + 1 + n for n in nodes))]
    )
    for slot, nodes in chosen.items():
        plain = ReferenceBackend(weights, drafter, 1, 192)
        text = [*ids, *(drafts[slot].tokens[n] for n in nodes)]
        feed(plain, 0, text[:start])
        feed(plain, 0, text[start:], start)
        after = len(text)
        assert torch.equal(feed(plain, 0, [5, 6, 7], after), feed(backend, slot, [5, 6, 7], after))
        assert plain.draft([DraftRequest(9, 0, after)], 7)[0].tokens == (
            backend.draft([DraftRequest(9, slot, after)], 7)[0].tokens
        )


def propose_tree(texts: Sequence[Sequence[int]], num_right: Callable[[int], int]) -> Any:
    """A `draft` with `num_right(position)` right tokens, each beside and before decoys, and wrong leaves after."""

    def draft(requests: Sequence[DraftRequest], num_drafts: int, tree_budget: int | None = None) -> list[Draft]:
        assert tree_budget is not None
        drafts = []
        for request in requests:
            position = request.position
            text = next(t for t in texts if len(t) > position and t[position] == request.anchor)
            right = list(text[position + 1 : position + 1 + min(num_right(position), num_drafts)])
            tokens, parents, parent = list[int](), list[int](), -1
            for depth in range(num_drafts):
                token = right[depth] if depth < len(right) else None
                for decoy in (1, 2):
                    base = token if token is not None else 100 + depth
                    tokens.append((base + decoy) % 512 if token is not None else 500 + decoy)
                    parents.append(parent)
                if token is None:
                    break
                tokens.append(token)
                parents.append(parent)
                parent = len(tokens) - 1
            drafts.append(Draft(tokens, parents, [0.5] * len(tokens)))
        return drafts

    return draft


def test_trees_leave_the_text_alone(
    tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.from_pretrained(tiny_packed_dir, backend="reference")
    texts = {
        name: [plain.generate(p, NUM_NEW, seed=3, ignore_eos=True, **options).tokens for p in PROMPTS]
        for name, options in SAMPLING.items()
    }
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="reference", tree_budget=12)
    assert_same_text(engine, texts)
    engine.set_drafter(make_drafter(**OPTIONS["everything"]))
    engine.set_strategy(DraftStrategy(noise="shared", tree_budget=9))
    assert_same_text(engine, texts)
    # A random drafter is nearly always wrong; trees with right paths of a varying depth are not.
    for name, options in SAMPLING.items():
        whole = [prompt + tokens for prompt, tokens in zip(PROMPTS, texts[name], strict=True)]
        for num_right, least in ((lambda position: 7, 5.0), (lambda position: position % 8, 1.5)):
            monkeypatch.setattr(engine.backend, "draft", propose_tree(whole, num_right))
            found = engine.generate(PROMPTS, NUM_NEW, seed=3, ignore_eos=True, **options)
            assert [g.tokens for g in found] == texts[name]
            assert all(g.stats.acceptance_length > least for g in found)


def test_statistics_of_trees(tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="reference", tree_budget=12)
    engine.set_strategy(DraftStrategy(3, tree_budget=12))
    tokens = engine.generate(PROMPTS[0], 21, ignore_eos=True).tokens
    monkeypatch.setattr(engine.backend, "draft", propose_tree([PROMPTS[0] + tokens], lambda position: 3))
    stats = engine.generate(PROMPTS[0], 21, ignore_eos=True).stats
    # Five rounds, each an anchor and three levels of two decoys and the right token
    assert (stats.num_rounds, stats.num_rows, stats.num_drafted) == (5, 50, 45)
    assert stats.accepted_by_position == [5, 5, 5] == stats.drafted_by_position
    assert (stats.rows_per_token, stats.drafted_per_token) == (50 / 20, 45 / 20)

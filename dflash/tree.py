"""Proposals as a tree: one continuation, or several that share their beginnings, to be verified in one step.

A drafted block gives a distribution for each position. Taking the best token of every position is a chain, and its
first wrong token ends the round. A tree spends a budget of rows on the most probable beginnings instead: where the
drafter is unsure early it holds two or three tokens of one position, where it is sure it runs deep. Nodes are taken
best first from a heap, by the product of the probabilities along their path. When positions are independent given the
context, which is what a drafter without a Markov head assumes, no other tree of as many nodes has a larger expected
number of accepted tokens by the drafter's own probabilities; with a Markov head the conditionals take their place.

Source: DDTree (arXiv 2604.12989), algorithm and argument; the chain is the greedy proposal of DFlash.

Legend: U draft vocabulary.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """Proposals after an anchor, parents before children.

    `parents[i]` is the index of the node that node i follows, -1 for the anchor. `probabilities[i]` is the drafter's
    own belief in node i, given that all before it on its path are right; empty where a proposer has none.
    """

    tokens: list[int]
    parents: list[int]
    probabilities: list[float]

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Sequence[float] = ()) -> Draft:
        """The draft in which every token follows the one before it."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), list(probabilities))

    def depths(self) -> list[int]:
        """Distance of every node from the anchor, from 1 on."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def leading(self, count: int) -> Draft:
        """The first `count` nodes: a tree again, because parents come first."""
        return Draft(self.tokens[:count], self.parents[:count], self.probabilities[:count])

    def within(self, depth: int) -> Draft:
        """The nodes at most `depth` tokens from the anchor."""
        kept = [node for node, at in enumerate(self.depths()) if at <= depth]
        if len(kept) == len(self.tokens):
            return self
        place = {-1: -1} | {node: index for index, node in enumerate(kept)}
        return Draft(
            [self.tokens[node] for node in kept],
            [place[self.parents[node]] for node in kept],
            [self.probabilities[node] for node in kept] if self.probabilities else [],
        )


class Scores(Protocol):
    """What a drafted block says about its positions."""

    def log_probabilities(self, depth: int, previous: int) -> Tensor | None:
        """Float32 [U] of the token at `depth` (from 0), after the token `previous`; None where they are not numbers."""
        ...

    def tokens(self, draft_ids: Sequence[int]) -> list[int]:
        """The target's token ids of ids of the draft vocabulary."""
        ...


def best_chain(scores: Scores, anchor: int, depth: int) -> Draft:
    """The most probable token of each position, drafted left to right; shorter where scores are not numbers."""
    tokens: list[int] = []
    probabilities: list[float] = []
    for at in range(depth):
        log_probabilities_U = scores.log_probabilities(at, tokens[-1] if tokens else anchor)
        if log_probabilities_U is None:
            break
        best = int(log_probabilities_U.argmax())
        tokens += scores.tokens([best])
        probabilities.append(float(log_probabilities_U[best].exp()))
    return Draft.chain(tokens, probabilities)


def best_first_tree(scores: Scores, anchor: int, depth: int, budget: int) -> Draft:
    """The `budget` most probable beginnings of at most `depth` tokens.

    Nodes come in the order of their probability, so that any leading part is the best tree of its size. Raises
    ValueError for a depth or a budget below 1.
    """
    if depth < 1 or budget < 1:
        raise ValueError(f"a draft tree needs a depth and a budget of at least 1, got {depth} and {budget}")
    tokens: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    # Candidates: minus the path's log-probability, a number that breaks ties, parent, depth, rank among its siblings.
    heap: list[tuple[float, int, int, int, int]] = []
    ranked: dict[int, tuple[list[int], list[float]]] = {}
    path_log_probability: list[float] = []
    num_pushed = 0

    def push(parent: int, at: int, rank: int) -> None:
        nonlocal num_pushed
        values = ranked[parent][1]
        if rank < len(values) and values[rank] > -float("inf"):
            base = path_log_probability[parent] if parent >= 0 else 0.0
            heapq.heappush(heap, (-(base + values[rank]), num_pushed, parent, at, rank))
            num_pushed += 1

    def expand(parent: int, at: int) -> None:
        """Ranks the children of a node, and makes its best one a candidate."""
        if at == depth:
            return
        log_probabilities_U = scores.log_probabilities(at, tokens[parent] if parent >= 0 else anchor)
        if log_probabilities_U is None:
            return
        top = torch.topk(log_probabilities_U, min(budget, len(log_probabilities_U)))
        ranked[parent] = scores.tokens(top.indices.tolist()), top.values.tolist()
        push(parent, at, 0)

    expand(-1, 0)
    while heap and len(tokens) < budget:
        negated, _, parent, at, rank = heapq.heappop(heap)
        found, values = ranked[parent]
        tokens.append(found[rank])
        parents.append(parent)
        probabilities.append(math.exp(values[rank]))
        path_log_probability.append(-negated)
        push(parent, at, rank + 1)
        expand(len(tokens) - 1, at + 1)
    return Draft(tokens, parents, probabilities)

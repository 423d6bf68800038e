"""The kernels of `draft`, `embed` and `accept` alone, on random texts, against the functions of the host's loop.

Texts are longer than the block that a prompt lookup compares at a time, lie in front of what an earlier text left in
the slot, and end by either of two tokens, by a logit that is no number, or by their length.

Legend: R rows, L positions.
"""

import random

import pytest
import torch

from speedstack.dflash.accept import accept
from speedstack.dflash.ngram import NgramIndex
from speedstack.runtime.backends.base import RoundsRequest
from speedstack.runtime.backends.gpu.multi_step import rounds_inbox
from speedstack.runtime.plan.record_layout import (
    ANCHOR,
    CAPACITY,
    END,
    FIRST_ROW,
    LENGTH,
    NUM_PROPOSED,
    NUM_ROWS,
    OUTCOME,
    RECORD,
    TOKEN,
)
from speedstack.runtime.rounds.histogram import NUM_BINS
from speedstack.runtime.rounds.row_allocation import allocate_rows
from tests.runtime.backends.gpu.launch import Launcher

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

R, NUM_SLOTS, NUM_CASES = 16, 3, 40
EOS = (2, 7)


def random_requests(rng: random.Random, max_length: int) -> list[RoundsRequest]:
    """Two sequences of one to six words, that ask for one to five drafts and may have little room for them."""
    ngram_size = rng.randint(1, 6)
    requests = []
    for slot in rng.sample(range(NUM_SLOTS), 2):
        num_words = rng.randint(1, 6)
        text = [rng.randrange(num_words) for _ in range(rng.randint(1, max_length - 1))]
        end = min(max_length, len(text) + rng.randint(1, 8))
        requests.append(RoundsRequest(text, slot, end, rng.random() < 0.7, rng.randint(1, 5), ngram_size))
    return requests


def history_of(rng: random.Random, requests: list[RoundsRequest], max_length: int) -> torch.Tensor:
    """Each text in its slot, with words behind it that it could have."""
    history_SL = torch.tensor([[rng.randrange(4) for _ in range(max_length)] for _ in range(NUM_SLOTS)])
    for request in requests:
        history_SL[request.slot, : len(request.tokens)] = torch.tensor(request.tokens)
    return history_SL.int()


def proposals_of(request: RoundsRequest) -> list[int]:
    num_left = request.end - len(request.tokens)
    return NgramIndex(request.ngram_size).propose(request.tokens, min(request.num_drafts, num_left - 1))


def run(launch: Launcher, op: str, *pointers: torch.Tensor, num: int = R, **constants: int | bool) -> None:
    """Every item of a phase of `num` rows or sequences."""
    launch.phase(pointers, op=op, axes=(num,), R=num, **constants)


def test_drafts_are_those_of_the_index(launch: Launcher) -> None:
    """Token for token, whatever the block; for a sequence that is over, or decoded by the host, nothing is written."""
    rng, num_proposals, num_of_many_blocks = random.Random(0), 0, 0
    for case in range(NUM_CASES):
        block, max_length = rng.choice([4, 8, 16, 64]), rng.choice([24, 80])
        requests = random_requests(rng, max_length)
        _, _, sequences, _ = (records.clone() for records in rounds_inbox(requests, R))
        if case % 8 == 0:
            sequences[0, END] = sequences[0, LENGTH]
        proposals = torch.full((R, R), -9, dtype=torch.int32)
        history = history_of(rng, requests, max_length)
        run(launch, "draft", sequences, history, proposals, STRIDE=max_length, BLOCK=block)
        for sequence, request in enumerate(requests):
            if sequences[sequence, END] > sequences[sequence, LENGTH]:
                wanted = proposals_of(request)
                assert proposals[sequence, : 1 + len(wanted)].tolist() == [len(wanted), *wanted], (case, request, block)
                proposals[sequence, : 1 + len(wanted)] = -9
                num_proposals += len(wanted)
                num_of_many_blocks += len(wanted) > 0 and len(request.tokens) > block
        assert (proposals == -9).all()
    assert num_proposals > NUM_CASES and num_of_many_blocks > NUM_CASES // 2


@pytest.mark.parametrize("has_proposals", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_rows_are_dealt_as_the_host_deals_them(has_proposals: bool, num_rows: int, launch: Launcher) -> None:
    """Records, sampling states and embeddings of all rows; those that the host has named stay as they are."""
    rng, num_short = random.Random(num_rows), 0
    embedding_VD = torch.arange(24.0)[:, None].expand(24, 8).contiguous()
    for _ in range(NUM_CASES):
        rows, sampling, sequences, draws = torch.randint(1, 20, (4, num_rows, RECORD), dtype=torch.int32)
        rows[:, TOKEN] -= rng.choice([0, 10])
        rows[:, -2:] = 0
        sequences[:, CAPACITY] *= rng.random() < 0.8
        sequences[:, END] = sequences[:, LENGTH] + torch.tensor([rng.choice([0, 1, 5]) for _ in range(num_rows)])
        proposals = torch.randint(0, 20, (num_rows, num_rows), dtype=torch.int32)
        proposals[:, NUM_PROPOSED] = torch.tensor([rng.randint(0, num_rows - 1) for _ in range(num_rows)])
        wanted_rows, wanted_sampling = rows.clone(), sampling.clone()
        if sequences[:, CAPACITY].any():
            wanted_rows[:], wanted_sampling[:] = torch.tensor([-1] + [0] * (RECORD - 1)), 0
            live = sequences[:, END] > sequences[:, LENGTH]
            wanted = [
                (1 + own[NUM_PROPOSED] * has_proposals) if on else 0
                for own, on in zip(proposals.tolist(), live, strict=True)
            ]
            first = 0
            for sequence, number in enumerate(allocate_rows(wanted, num_rows)):
                _, anchor, slot, length, *_ = sequences[sequence].tolist()
                for row, token in enumerate([anchor, *proposals[sequence, 1:].tolist()][:number]):
                    wanted_rows[first + row, :FIRST_ROW] = torch.tensor([token, slot, length - 1 + row, length - 1])
                    wanted_sampling[first + row] = draws[sequence]
                wanted_rows[sequence, [FIRST_ROW, NUM_ROWS]] = torch.tensor([first, number], dtype=torch.int32)
                first += number
                num_short += number < wanted[sequence]
        hidden_DR = torch.full((8, num_rows), -1.0)
        row_allocation, constants = (sequences, draws, proposals, rows, sampling), {"HAS_PROPOSALS": has_proposals}
        for_norm = (torch.ones(8), torch.empty(16, num_rows), torch.empty(1, num_rows))
        bins = torch.full((num_rows, 2, NUM_BINS), -5)
        pointers = (*row_allocation, embedding_VD, hidden_DR, *for_norm, bins)
        run(launch, "embed", *pointers, num=num_rows, D=8, NP=1, **constants)
        assert not bins.any(), "of all rows"
        assert torch.equal(rows, wanted_rows) and torch.equal(sampling, wanted_sampling)
        used = rows[:, TOKEN] >= 0
        wanted_R = torch.where(used, rows[:, TOKEN].float(), -1.0)
        assert torch.equal(hidden_DR, wanted_R.expand(8, num_rows))
    assert num_short > 10 or not has_proposals or num_rows == 1


def test_acceptance_is_that_of_the_host(launch: Launcher) -> None:
    """How many drafts stand, what is committed, where the text ends; nothing else of any slot changes."""
    rng, ways = random.Random(1), set[str]()
    max_length = 24
    for case in range(NUM_CASES):
        requests, eos = random_requests(rng, max_length), EOS[: rng.randint(1, 2)]
        rows, _, sequences, _ = (records.clone() for records in rounds_inbox(requests, R))
        proposals = torch.full((R, R), -9, dtype=torch.int32)
        report = torch.full(((1 + OUTCOME) * R,), -9, dtype=torch.int32)  # the token after each row, then every outcome
        history = history_of(rng, requests, max_length)
        wanted_history = history.clone()
        wanted, first = [], 0
        for sequence, request in enumerate(requests):
            drafts = proposals_of(request)
            rows[first : first + 1 + len(drafts), TOKEN] = torch.tensor([request.tokens[-1], *drafts]).int()
            rows[sequence, [FIRST_ROW, NUM_ROWS]] = torch.tensor([first, 1 + len(drafts)], dtype=torch.int32)
            proposals[sequence, NUM_PROPOSED] = len(drafts) + case  # of which there were rows for so many
            chosen = [token if rng.random() < 0.75 else rng.choice([-1, 0, 1, 2, 7, 9]) for token in drafts]
            chosen.append(rng.choice([-1, 0, 2, 7, 9]))
            report[first : first + len(chosen)] = torch.tensor(chosen).int()
            tokens = accept(drafts, chosen.__getitem__)
            num_accepted, length, end = len(tokens) - 1, len(request.tokens), request.end
            for number, token in enumerate(tokens):
                if token < 0 or (request.watches_eos and token in eos):
                    tokens, end = tokens[: number + 1], length + number + 1
                    ways.add(f"{token}, at the end: {end == request.end}")
                    break
            else:
                ways.add("eos ignored" if set(tokens) & set(eos) else "goes on")
            wanted_history[request.slot, length : length + len(tokens)] = torch.tensor(tokens).int()
            outcome = [1 + len(drafts), num_accepted, len(drafts) + case]
            wanted.append((outcome, [tokens[-1], length + len(tokens), end]))
            first += 1 + len(drafts)
        rows_before = rows.clone()
        constants = {"LP": len(eos), "STRIDE": max_length, "HAS_HISTORY": True, "HAS_PROPOSALS": True}
        constants["REPORT"] = len(report)
        run(launch, "accept", rows, sequences, report, torch.tensor(eos).int(), history, proposals, **constants)
        for sequence, (outcome, state) in enumerate(wanted):
            assert report[R + OUTCOME * sequence :][:OUTCOME].tolist() == outcome, (case, requests[sequence])
            assert sequences[sequence, [ANCHOR, LENGTH, END]].tolist() == state, (case, requests[sequence])
        assert torch.equal(history, wanted_history)
        assert torch.equal(rows, rows_before)
    assert {"goes on", "eos ignored", *(f"{token}, at the end: False" for token in (-1, *EOS))} <= ways

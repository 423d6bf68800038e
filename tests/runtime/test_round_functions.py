"""The kernels `draft` and `accept` alone, on random texts, against the functions of the host's loop.

Texts are longer than the block that a look-up compares at a time, lie in front of what an earlier text left in the
slot, and end by either of two tokens, by a logit that is no number, or by their length. Started by test_graph.py in a
process that interprets.

Legend: R rows, L positions.
"""

import os
import random

import pytest
import torch

from speedstack.dflash.accept import accept
from speedstack.dflash.ngram import NgramIndex
from speedstack.dflash.tree import Draft
from speedstack.runtime.backend import RoundsRequest
from speedstack.runtime.records import END, LENGTH, NUM_ROWS, TOKEN
from speedstack.runtime.rounds import rounds_inbox

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the process that interprets", allow_module_level=True)

from speedstack.runtime.bindings import Constants
from speedstack.runtime.interpret_triton import interpret_grid
from speedstack.runtime.kernels.triton.phase import phase_kernel

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


def accept_chain(drafts: list[int], chosen: list[int]) -> tuple[list[int], list[int]]:
    """`accept`; chosen: the target's token after the anchor, and after each draft."""
    return accept(Draft.chain(drafts), lambda node: chosen[node + 1])


def run(op: str, *pointers: torch.Tensor, **constants: int | bool) -> None:
    phase = Constants(op=op, axes=(R,), R=R, **constants)
    interpret_grid(phase_kernel, (R,), {"pointers": pointers, "PHASE": phase, "IS_DEPENDENT": False})


def test_drafts_are_those_of_the_index() -> None:
    """Token for token, whatever the block; and the rows that are not used are idle."""
    rng, num_proposals, num_of_many_blocks = random.Random(0), 0, 0
    for case in range(NUM_CASES):
        block, max_length = rng.choice([4, 8, 16, 64]), rng.choice([24, 80])
        requests = random_requests(rng, max_length)
        rows, _, sequences = (records.clone() for records in rounds_inbox(requests, R))
        run("draft", rows, sequences, history_of(rng, requests, max_length), STRIDE=max_length, BLOCK=block)
        first = 0
        for sequence, request in enumerate(requests):
            wanted = proposals_of(request)
            found = rows[first : first + 1 + request.num_drafts, TOKEN].tolist()
            idle = [-1] * (request.num_drafts - len(wanted))
            assert found == [request.tokens[-1], *wanted, *idle], (case, request, block)
            assert rows[sequence, NUM_ROWS] == 1 + len(wanted)
            num_proposals += len(wanted)
            num_of_many_blocks += len(wanted) > 0 and len(request.tokens) > block
            first += 1 + request.num_drafts
        assert (rows[first:, TOKEN] == -1).all()
    assert num_proposals > NUM_CASES and num_of_many_blocks > NUM_CASES // 2


def test_acceptance_is_that_of_the_host() -> None:
    """How many drafts stand, what is committed, where the text ends; nothing else of any slot changes."""
    rng, ways = random.Random(1), set[str]()
    max_length = 24
    for case in range(NUM_CASES):
        requests, eos = random_requests(rng, max_length), EOS[: rng.randint(1, 2)]
        rows, _, sequences = (records.clone() for records in rounds_inbox(requests, R))
        report = torch.full((3 * R,), -9, dtype=torch.int32)  # the token after each row, then every outcome
        history = history_of(rng, requests, max_length)
        wanted_history = history.clone()
        wanted, first = [], 0
        for sequence, request in enumerate(requests):
            drafts = proposals_of(request)
            rows[first : first + 1 + len(drafts), TOKEN] = torch.tensor([request.tokens[-1], *drafts]).int()
            rows[sequence, NUM_ROWS] = 1 + len(drafts)
            chosen = [token if rng.random() < 0.75 else rng.choice([-1, 0, 1, 2, 7, 9]) for token in drafts]
            chosen.append(rng.choice([-1, 0, 2, 7, 9]))
            report[first : first + len(chosen)] = torch.tensor(chosen).int()
            accepted, tokens = accept_chain(drafts, chosen)
            length, end = len(request.tokens), request.end
            for number, token in enumerate(tokens):
                if token < 0 or (request.watches_eos and token in eos):
                    tokens, end = tokens[: number + 1], length + number + 1
                    ways.add(f"{token}, at the end: {end == request.end}")
                    break
            else:
                ways.add("eos ignored" if set(tokens) & set(eos) else "goes on")
            wanted_history[request.slot, length : length + len(tokens)] = torch.tensor(tokens).int()
            wanted.append([1 + len(drafts), len(accepted), length + len(tokens), end])
            first += 1 + request.num_drafts
        rows_before = rows.clone()
        constants = {"LP": len(eos), "STRIDE": max_length, "HAS_HISTORY": True, "REPORT": 3 * R}
        run("accept", rows, sequences, report, torch.tensor(eos).int(), history, **constants)
        for sequence, (num_rows, num_accepted, length, end) in enumerate(wanted):
            assert report[R + 2 * sequence :][:2].tolist() == [num_rows, num_accepted], (case, requests[sequence])
            assert sequences[sequence, [LENGTH, END]].tolist() == [length, end], (case, requests[sequence])
        assert torch.equal(history, wanted_history)
        assert torch.equal(rows, rows_before)
    assert {"goes on", "eos ignored", *(f"{token}, at the end: False" for token in (-1, *EOS))} <= ways

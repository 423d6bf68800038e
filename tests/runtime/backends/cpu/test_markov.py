"""The compiled Markov head drafts what the module drafts, and its kernel is exact."""

import copy
from typing import Any

import pytest
import torch

from speedstack.runtime.backends.base import DraftRequest, Rows
from speedstack.runtime.backends.cpu.backend import CpuBackend
from speedstack.runtime.backends.cpu.builder import Assembler, Buffers
from speedstack.runtime.backends.cpu.packed_layout import panels
from speedstack.runtime.backends.cpu.program import Program, Runner, records_of
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec
from speedstack.runtime.model.weights import ModelWeights
from tests.runtime.strategy_cases import PROMPTS, MakeDrafter


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"sample_from_anchor": True, "draft_vocab_size": 200}], ids=["plain", "pruned"]
)
def test_a_compiled_markov_head_drafts_what_the_module_drafts(
    seed: int, options: dict[str, Any], weights: ModelWeights, make_drafter: MakeDrafter
) -> None:
    """Token for token over 60 rounds of two sequences, whatever the number of threads; without it most are others."""
    model = make_drafter(markov_rank=24, seed=seed, **options)
    num_threads = torch.get_num_threads()
    oracle = ReferenceBackend(weights, model, 2, 192)
    backend = CpuBackend(weights, model, 2, 192)
    without = ModuleDrafter(model, weights.embedding_VD, weights.lm_head_VD, 2, 192)
    without.contexts = oracle.drafter.contexts if oracle.drafter is not None else []
    generator = torch.Generator().manual_seed(seed)
    num_corrected = 0
    try:
        for start in range(0, 180, 3):
            for slot in (0, 1):
                tokens = torch.randint(3, 512, (3,), generator=generator).tolist()
                rows = Rows(tokens, [slot] * 3, list(range(start, start + 3)))
                oracle.step(rows, [])
                backend.step(rows, [])
            anchors = torch.randint(3, 512, (2,), generator=generator).tolist()
            requests = [DraftRequest(anchor, slot, start + 3) for slot, anchor in enumerate(anchors)]
            torch.set_num_threads(1 + start % 3)
            count = model.config.num_proposals - start % 4
            drafts, expected = backend.draft(requests, count), oracle.draft(requests, count)
            assert [draft.tokens for draft in drafts] == [draft.tokens for draft in expected]
            model.markov_head, head = None, model.markov_head
            num_corrected += sum(
                a.tokens != b.tokens for a, b in zip(drafts, without.draft(requests, count), strict=True)
            )
            model.markov_head = head
    finally:
        torch.set_num_threads(num_threads)
    assert num_corrected > 60


def test_a_float32_drafter_is_compiled_as_its_bfloat16_values(weights: ModelWeights, make_drafter: MakeDrafter) -> None:
    exact = make_drafter(markov_rank=8)
    model = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter is not model.get_parameter("markov_head.markov_w1.weight"):
                parameter.mul_(1 + 1e-4)  # less than bfloat16 resolves
    drafts = []
    for one in (exact, model):
        backend = CpuBackend(weights, one, 1, 192)
        backend.step(Rows(PROMPTS[1], [0] * 70, list(range(70))), [])
        drafts.append(backend.draft([DraftRequest(7, 0, 70)], 7))
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("is_pruned", [False, True])
def test_markov_kernel_is_exact_and_breaks_ties_as_argmax(is_pruned: bool) -> None:
    """On small integers every sum is exact: logits bit for bit, chains token for token, with many ties."""
    generator = torch.Generator().manual_seed(0)
    vocab, rank, num_drafts, num_blocks = 150, 6, 5, 10
    num_tokens = 75 if is_pruned else vocab
    ids_U = torch.randperm(vocab, generator=generator)[:num_tokens].sort().values
    w1_VR = torch.randint(-2, 3, (vocab, rank), generator=generator).float()
    w2_UR = torch.randint(-2, 3, (num_tokens, rank), generator=generator).float()
    layer = LayerSpec(AttentionSpec(1, 1, 16, 16, 16, 1e4), DenseSpec(16))
    buffers = Buffers.of(16, [layer], num_tokens)
    base = torch.randint(-3, 4, (num_blocks * num_drafts, num_tokens), generator=generator).float()
    base[3 * num_drafts + 2, 7] = float("nan")
    buffers.logits[: len(base), :num_tokens] = base
    anchors = torch.randint(0, vocab, (num_blocks,), generator=generator).tolist()

    programs = []
    w2 = panels(w2_UR.bfloat16())
    for depth in range(num_drafts):
        program = Program(part="drafter")
        assembler = Assembler(program, buffers, 1, 16)
        assembler.add_markov(w1_VR, w2, ids_U.int() if is_pruned else None, depth, num_drafts, first_slot=1)
        assembler.add_best(num_tokens, with_probability=True, first=depth, step=num_drafts)
        programs.append(program)
    tokens = [token for anchor in anchors for token in (anchor, *[2] * num_drafts)]
    wanted = [row for row in range(len(tokens)) if row % (num_drafts + 1)]
    unused, num_ties = [0] * len(tokens), 0
    Runner().run(records_of(*programs), tokens, unused, unused, unused, wanted, num_threads=2)
    for block, anchor in enumerate(anchors):
        previous = anchor
        for depth in range(num_drafts):
            row = block * num_drafts + depth
            logits_U = base[row] + w1_VR[previous] @ w2_UR.T
            if bool(logits_U.isnan().any()):
                assert int(buffers.best[row]) == -1
                break
            assert torch.equal(buffers.logits[row, :num_tokens], logits_U)
            places = (logits_U == logits_U.max()).nonzero().flatten()
            num_ties += len(places) > 1
            assert int(buffers.best[row]) == int(places[0])
            previous = int(ids_U[places[0]]) if is_pruned else int(places[0])
    assert num_ties > 5

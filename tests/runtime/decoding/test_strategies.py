"""However tokens are proposed, the text is the target's own; and what cannot be is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.runtime import Engine
from speedstack.runtime.backends.base import DraftRequest, Rows
from speedstack.runtime.backends.cpu.backend import CpuBackend
from speedstack.runtime.backends.cpu.drafter import CompiledDrafter
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.rounds.sampling import NoiseTable, SamplingParams
from speedstack.runtime.rounds.speculation import DraftStrategy
from tests.runtime.strategy_cases import NUM_NEW, OPTIONS, PROMPTS, SAMPLING, MakeDrafter, assert_same_text


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(backend: str, tiny_packed_dir: Path) -> dict[str, list[list[int]]]:
    """Name of a sampling -> the texts without proposals."""
    engine = Engine.from_pretrained(tiny_packed_dir, backend=backend)  # type: ignore[arg-type]
    return {
        name: [engine.generate(p, NUM_NEW, seed=3, ignore_eos=True, **options).tokens for p in PROMPTS]
        for name, options in SAMPLING.items()
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_text_is_equal_with_every_drafter_option(
    option: str, backend: str, expected: dict[str, list[list[int]]], tiny_packed_dir: Path, make_drafter: MakeDrafter
) -> None:
    model = make_drafter(**OPTIONS[option])
    engine = Engine.from_pretrained(tiny_packed_dir, model, backend=backend)  # type: ignore[arg-type]
    assert engine.num_drafts == (8 if model.config.sample_from_anchor else 7)
    strategies = [DraftStrategy(), DraftStrategy("adaptive", noise="shared")]
    if backend == "reference":
        # One run of each way of drafting: what the option computes is the module's, and the same on both backends.
        strategies = [DraftStrategy(3 + len(option) % 4, noise="shared")]
    for strategy in strategies:
        engine.set_strategy(strategy)
        assert_same_text(engine, expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_backends_draft_the_same(
    option: str, weights: ModelWeights, make_drafter: MakeDrafter, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_drafter(**OPTIONS[option])
    oracle = ReferenceBackend(weights, model, 2, 192)
    with caplog.at_level(logging.WARNING):
        backend = CpuBackend(weights, model, 2, 192)
    assert isinstance(backend.drafter, CompiledDrafter) and not caplog.text
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    for slot, tokens in ((0, ids), (1, ids[::-1])):
        for one in (oracle, backend):
            one.step(Rows(tokens, [slot] * 40, list(range(40))), [])
    noise = NoiseTable(512, torch.device("cpu")).rows([(1, 2, 41 + i) for i in range(8)])
    params = SamplingParams(1.0, top_k=60)
    for requests in (
        [DraftRequest(7, 0, 40), DraftRequest(9, 1, 40)],
        [DraftRequest(7, 0, 40, params, noise), DraftRequest(9, 1, 40, params, noise)],
        [DraftRequest(7, 0, 40), DraftRequest(9, 1, 40, params, noise)],
        [DraftRequest(7, 0, 40, params)],
    ):
        for count in (model.config.num_proposals, 3):
            for got, wanted in zip(backend.draft(requests, count), oracle.draft(requests, count), strict=True):
                assert got.tokens == wanted.tokens and len(got.tokens) == count
                if requests[0].noise is not None:
                    # float32 sums in another order, through two layers and an exponential
                    assert got.probabilities == pytest.approx(wanted.probabilities, rel=1e-3)
    # A block whose last slots lie past the longest text
    for start in range(40, 191, 30):
        tokens = (ids * 5)[start : min(start + 30, 191)]
        for one in (oracle, backend):
            one.step(Rows(tokens, [1] * len(tokens), list(range(start, start + len(tokens)))), [])
    last, count = [DraftRequest(9, 1, 191)], model.config.num_proposals
    assert backend.draft(last, count)[0].tokens == oracle.draft(last, count)[0].tokens
    if option == "pruned vocabulary":
        allowed = set(model.target_ids(torch.arange(200)).tolist())
        assert set(oracle.draft([DraftRequest(7, 0, 40)], 7)[0].tokens) <= allowed


def test_drafter_options_without_a_kernel_are_logged_and_served_by_pytorch(
    weights: ModelWeights, make_drafter: MakeDrafter, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_drafter(head_dim=24, markov_rank=8)
    with caplog.at_level(logging.WARNING):
        backend = CpuBackend(weights, model, 1, 192)
    assert isinstance(backend.drafter, ModuleDrafter)
    assert "PyTorch for the drafter: its kernels need a drafter head size that is a multiple of 16, not 24" in (
        caplog.text
    )


def test_text_is_equal_with_and_without_prompt_lookup(
    backend: str, expected: dict[str, list[list[int]]], tiny_packed_dir: Path
) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, "ngram", backend=backend)  # type: ignore[arg-type]
    assert engine.num_drafts == 7 and engine.drafter_sha256 is None
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    for strategy in (DraftStrategy(), DraftStrategy(3, ngram_size=1), DraftStrategy("adaptive")):
        engine.set_strategy(strategy)
        for name, options in SAMPLING.items():
            found = engine.generate(prompts, NUM_NEW, seed=3, ignore_eos=True, **options)
            assert [g.tokens for g in found] == expected[name]


def test_prompt_lookup_proposes_what_followed_before(tiny_packed_dir: Path) -> None:
    plain = Engine.from_pretrained(tiny_packed_dir, backend="cpu")
    tokens = plain.generate(PROMPTS[0], 40, ignore_eos=True).tokens
    # The prompt holds its own continuation already; then only the first look-ups can miss.
    prompt = [*PROMPTS[0], *tokens, 3, 3]
    engine = Engine.from_pretrained(tiny_packed_dir, "ngram", backend="cpu", num_drafts=5)
    found = engine.generate(prompt, 40, ignore_eos=True)
    assert found.tokens == plain.generate(prompt, 40, ignore_eos=True).tokens
    assert found.stats.num_drafted >= sum(found.stats.drafted_by_position) > 0


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_noise": "gaussian"}, "draft_noise must be 'none' or 'shared', not 'gaussian'"),
        ({"num_drafts": 8}, "num_drafts 8 must be 'adaptive' or between 1 and the drafter's 7"),
        ({"num_drafts": 0}, "num_drafts 0 must be"),
        ({"num_drafts": "some"}, "num_drafts 'some' must be 'adaptive' or a number"),
        ({"drafter": None, "draft_noise": "shared"}, "draft_noise 'shared' needs a drafter"),
        ({"drafter": "ngram", "draft_noise": "shared"}, "draft_noise needs a drafter's probabilities"),
        ({"drafter": "ngram", "num_drafts": 64}, "num_drafts 64 must be 'adaptive' or between 1 and one step's 63"),
    ],
)
def test_impossible_strategies_are_refused_in_one_line(
    options: dict[str, Any], message: str, tiny_packed_dir: Path, make_drafter: MakeDrafter
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_pretrained(tiny_packed_dir, **({"drafter": make_drafter()} | options))
    assert "\n" not in str(error.value)


def test_refusals_of_a_running_engine_change_nothing(tiny_packed_dir: Path, make_drafter: MakeDrafter) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(sample_from_anchor=True), backend="cpu", num_drafts=8)
    rounds = engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True).stats.num_rounds
    with pytest.raises(ValueError, match="num_drafts 9 must be"):
        engine.set_strategy(DraftStrategy(9))
    with pytest.raises(ValueError, match="the drafter's 7"):
        engine.set_drafter(make_drafter())
    assert engine.num_drafts == 8 and engine.strategy == DraftStrategy(8)
    assert engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True).stats.num_rounds == rounds
    with pytest.raises(ValueError, match="ngram_size"):
        DraftStrategy(ngram_size=0)

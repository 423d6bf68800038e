"""The checks pass on a backend that is right, and each fails on one that is wrong in its way.

The backend under test is the reference, which needs no kernels; interpreted ones are checked with the whole suite.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from speedstack.eval.gpu_suite import correctness
from speedstack.eval.gpu_suite.correctness import Checker, row_error
from speedstack.eval.gpu_suite.edges import edge_weights, experts_of
from speedstack.eval.gpu_suite.near_ties import choice_gap, is_near_tie
from speedstack.eval.gpu_suite.scale import scale_for
from speedstack.eval.gpu_suite.sections import CHECKS, CHECKS_OF
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.bindings.layers import LARGEST_NARROW_SCALE
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.released_models import MODELS
from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.rounds.sampling import SamplingParams, gumbel_noise, sample

SCALE = scale_for("cpu")


@pytest.fixture(autouse=True)
def reference_takes_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_caches(oracle: ReferenceBackend, backend: Any) -> None:
        for cache, wanted in zip(backend.caches, oracle.caches, strict=True):
            cache.k_SLGH.copy_(wanted.k_SLGH)
            cache.v_SLGH.copy_(wanted.v_SLGH)

    monkeypatch.setattr(correctness, "copy_caches", copy_caches)


def breaking(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """The backend under test, not the oracle, gives logits that `change` made of the right ones and the rows."""
    step = ReferenceBackend.step

    class Broken(ReferenceBackend):
        def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
            logits_WV, best = step(self, rows, logit_rows)
            logits_WV = change(logits_WV, rows)
            return logits_WV, logits_WV.argmax(-1).tolist() if len(best) else best

    monkeypatch.setattr(correctness, "make_backend", lambda name, *arguments: Broken(*arguments))
    monkeypatch.setattr("speedstack.runtime.engine.make_backend", lambda name, w, d, n, m, *options: Broken(w, d, n, m))


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_passes(model: str) -> None:
    checker = Checker(SCALE, model, "reference")
    found = checker.check_buffers()
    assert found["num_tokens_compared"] == 3 and found["errors"].keys() == {"logits"}
    assert checker.check_row_invariance()["context"] == SCALE.check_context
    assert checker.check_text() == {"num_texts": 2, "num_tokens": 4}
    assert ("check_fp8" in CHECKS_OF.get(model, CHECKS)) == (model == "mimo-v2-flash")
    assert checker.check_fp8()["num_tokens_compared"] > 0
    assert ("check_prompt_lookup" in CHECKS_OF.get(model, CHECKS)) == (model == "qwen3-30b-a3b")
    looked_up = checker.check_prompt_lookup()
    assert looked_up["num_tokens"] == 48 and looked_up["num_drafted"] > looked_up["num_accepted"] > 0
    assert ("check_drafter" in CHECKS_OF.get(model, CHECKS)) == (model == "qwen3-30b-a3b")
    drafted = checker.check_drafter()
    assert drafted["num_tokens"] == 16 and drafted["num_drafted"] > 8
    assert checker.check_sampling() == {"is_drawn_by_host": True}


def test_ties_of_experts_and_ends_of_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that takes the higher of two that tie, and one where a lost row takes others along."""
    checker = Checker(SCALE, "gpt-oss-20b", "reference")
    found = checker.check_edges()
    assert found["num_rows_decided"] > found["num_rows_lost"] > 0 and found["sampling"] == {"is_drawn_by_host": True}
    assert checker.spec.num_layers == 2, "the model is what it was"
    weights = edge_weights(SCALE, torch.float32, torch.device("cpu"))
    experts = experts_of(weights)
    logits_RE = torch.randn(4, 64) @ experts.router_ED.T
    assert torch.equal(logits_RE[:, :8], logits_RE[:, 8:]) and isinstance(experts.gate_up_EID, MXFP4Tensor)
    assert experts.gate_up_EID.scales.amax() > LARGEST_NARROW_SCALE and experts.gate_up_EID.scales.amin() == 0

    class Higher(ReferenceBackend):
        def __init__(self, weights: ModelWeights, *arguments: Any) -> None:
            moe = experts_of(weights)
            assert isinstance(moe.gate_up_EID, MXFP4Tensor) and isinstance(moe.down_EDI, MXFP4Tensor)
            turned = [MXFP4Tensor(w.codes.roll(8, 0), w.scales.roll(8, 0)) for w in (moe.gate_up_EID, moe.down_EDI)]
            layer = replace(weights.layers[0], mlp=replace(moe, gate_up_EID=turned[0], down_EDI=turned[1]))
            super().__init__(replace(weights, layers=[layer]), *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(correctness, "make_backend", lambda name, *arguments: Higher(*arguments))
        with pytest.raises(RuntimeError, match=r"logits is off by .* where experts tie or scales are extreme"):
            checker.check_edges()
    breaking(monkeypatch, lambda logits, rows: logits + logits.isnan().any() * 1e-3)
    with pytest.raises(RuntimeError, match="changes rows that did not choose it"):
        checker.check_edges()
    breaking(monkeypatch, lambda logits, rows: logits.nan_to_num())
    with pytest.raises(RuntimeError, match="a row that chose an expert that is no number has logits"):
        checker.check_edges()


def test_wrong_logits_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(SCALE, "qwen3-30b-a3b", "reference")
    breaking(monkeypatch, lambda logits, rows: logits * 1.001)
    with pytest.raises(RuntimeError, match=r"logits is off by 1\.00e-03 of its norm, allowed 1e-04"):
        checker.check_buffers()
    breaking(monkeypatch, lambda logits, rows: logits * float("nan"))
    with pytest.raises(RuntimeError, match="logits is off by nan"):
        checker.check_buffers()


def test_wrong_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(SCALE, "qwen3-30b-a3b", "reference")
    step = ReferenceBackend.step

    class Broken(ReferenceBackend):
        def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
            logits_WV, best = step(self, rows, logit_rows)
            return logits_WV, [token + 1 for token in best]

    monkeypatch.setattr(correctness, "make_backend", lambda name, *arguments: Broken(*arguments))
    with pytest.raises(RuntimeError, match="3 of 3 tokens differ"):
        checker.check_buffers()


@pytest.mark.parametrize(
    ("number", "company"), [(3, "first among 2 others"), (2, "behind its own last token, as a draft")]
)
def test_rows_that_depend_on_other_rows_are_found(monkeypatch: pytest.MonkeyPatch, number: int, company: str) -> None:
    """One unit in the last place, in steps of so many rows."""
    checker = Checker(SCALE, "gpt-oss-20b", "reference")

    def nudge(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        return torch.nextafter(logits, logits + 1) if len(rows.tokens) == number else logits

    breaking(monkeypatch, nudge)
    with pytest.raises(RuntimeError, match=f"a row's bits change when it is {company}"):
        checker.check_row_invariance()


def test_text_that_scoring_does_not_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(SCALE, "gpt-oss-20b", "reference")
    breaking(monkeypatch, lambda logits, rows: -logits if len(rows.tokens) == 2 else logits)
    with pytest.raises(RuntimeError, match="token 2 of a text is not the one that scoring the text finds best"):
        checker.check_text()


def test_text_that_changes_with_drafts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that depend on how often the backend has computed any."""
    checker, calls = Checker(SCALE, "qwen3-30b-a3b", "reference"), list[int]()

    def turn(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        calls.append(len(rows.tokens))
        return logits.roll(len(calls), dims=-1)

    breaking(monkeypatch, turn)
    with pytest.raises(RuntimeError, match="a text changes with drafts that are looked up"):
        checker.check_prompt_lookup()
    with pytest.raises(RuntimeError, match="a text changes with drafts of a drafter"):
        checker.check_drafter()


def test_look_up_that_finds_nothing_is_refused() -> None:
    checker = Checker(replace(SCALE, num_lookup_tokens=2), "qwen3-30b-a3b", "reference")
    with pytest.raises(RuntimeError, match=r"none of \d+ drafts was accepted: give the check longer texts"):
        checker.check_prompt_lookup()


def drawing(monkeypatch: pytest.MonkeyPatch, offset: int = 1, temperature: float | None = None) -> Checker:
    """Of a backend that draws, with the noise of `offset` positions after the row's, always at that temperature."""
    step = ReferenceBackend.step

    class Drawing(ReferenceBackend):
        rounds: Any = object()

        def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
            logits_WV, best = step(self, replace(rows, draws=None), logit_rows)
            for number, row in enumerate(logit_rows if rows.draws else []):
                draw, position = (rows.draws or [])[row], rows.positions[row] + offset
                assert draw is not None
                noise_RV = gumbel_noise([draw.seed], [draw.sequence], [position], logits_WV.shape[1], logits_WV.device)
                params = draw.params if temperature is None else SamplingParams(temperature)
                best[number] = sample(logits_WV[number], noise_RV[0], params)
            return logits_WV, best

    monkeypatch.setattr(correctness, "make_backend", lambda name, *arguments: Drawing(*arguments))
    return Checker(SCALE, "qwen3-30b-a3b", "reference")


def test_drawn_tokens_are_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another position's noise, another temperature and noise that decides nothing are found."""
    found = drawing(monkeypatch).check_sampling()
    assert (
        found["num_tokens_compared"] == 3 * len(correctness.SAMPLINGS)
        and found["num_near_ties"] == 0 < found["num_not_most_probable"]
    )
    with pytest.raises(RuntimeError, match=r"with SamplingParams\(temperature=0\.7.*\) token \d+ is drawn, not \d+"):
        drawing(monkeypatch, offset=0).check_sampling()
    with pytest.raises(RuntimeError, match=r"with .* is drawn, not"):
        drawing(monkeypatch, temperature=1e-4).check_sampling()
    monkeypatch.setattr(correctness, "SAMPLINGS", (SamplingParams(1e-4),))
    with pytest.raises(RuntimeError, match="no token that is drawn differs from the most probable one"):
        drawing(monkeypatch).check_sampling()
    monkeypatch.setattr(correctness, "is_near_tie", lambda *arguments: True)
    with pytest.raises(RuntimeError, match="no token that is drawn"):
        drawing(monkeypatch).check_sampling()


def test_near_ties_of_scores() -> None:
    """Units of the largest number that is added: 16 has one of 2**-19, of 2**-23 times itself."""
    params, noise_V = SamplingParams(1.0), torch.tensor([16.0, 0.0, 1.0])
    for units, is_tie in ((1, True), (8, True), (9, False)):
        logits_V = torch.tensor([0.0, 16.0 - units * 2.0**-19, 1.0])
        assert is_near_tie(logits_V, noise_V, params) == is_tie
    assert not is_near_tie(torch.full((3,), float("nan")), noise_V, params)
    assert not is_near_tie(torch.tensor([0.0, 16.0, 1.0]), noise_V, SamplingParams(1.0, top_k=1))


def test_near_ties_of_experts() -> None:
    """By hand: the third best of four is chosen last; a sigmoid's slope is at most a quarter."""
    logits_RE = torch.tensor([[3.0, 2.0, 1.0, 0.9]])
    softmax = MoeSpec(4, 3, 32, "softmax", has_correction_bias=False, renormalize=True)
    assert choice_gap(logits_RE, None, softmax).item() == pytest.approx(0.1)
    sigmoid = MoeSpec(4, 3, 32, "sigmoid", has_correction_bias=True, renormalize=True)
    correction_E = torch.tensor([0.0, 0.0, 0.0, 0.5])
    wanted = 4 * (torch.tensor(2.0).sigmoid() - torch.tensor(1.0).sigmoid()).item()
    assert choice_gap(logits_RE, correction_E, sigmoid).item() == pytest.approx(wanted)
    every = MoeSpec(4, 4, 32, "softmax", has_correction_bias=False, renormalize=True)
    assert choice_gap(logits_RE, None, every).item() == float("inf")


def test_row_error_is_the_worst_chosen_row() -> None:
    wanted = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    found = wanted + torch.tensor([[0.5, 0.0], [5.0, 0.0]])
    assert row_error(found, wanted, torch.tensor([True, True])) == pytest.approx(1.0)
    assert row_error(found, wanted, torch.tensor([True, False])) == pytest.approx(0.1)

"""The compiled sampler: the definition's token, always, on every instruction set, or an admission that it cannot tell.

Legend: V vocabulary, R rows, W rows with logits.
"""

import logging
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from speedstack.quant.kernels.build import load_library
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import Draw
from speedstack.runtime.backends.cpu import sampling as compiled_sampling
from speedstack.runtime.backends.cpu.kernels.build import FLAGS, INSTRUCTION_SETS, available_sets
from speedstack.runtime.backends.cpu.sampling import AMBIGUOUS, HEADER, NOT_WANTED, SOURCE, CompiledSampler, SampledRows
from speedstack.runtime.decoding import loop
from speedstack.runtime.rounds.sampling import SHARE_BITS, SamplingParams, gumbel, gumbel_noise, masses, sample
from tests.runtime.strategy_cases import NUM_NEW, PROMPTS, SAMPLING, MakeDrafter

CPU = torch.device("cpu")
SEED, KEY = 2**63 + 12345, 2**40 + 77
PARAMS = [
    SamplingParams(temperature, top_p, top_k)
    for temperature in (1e-4, 0.1, 0.8, 1.0, 5.0)
    for top_p, top_k in ((1.0, 0), (1.0, 1), (1.0, 50), (0.9, 0), (0.9, 50), (0.3, 3), (1e-6, 0), (0.999, 2000))
]


class Case(NamedTuple):
    logits_V: torch.Tensor
    params: SamplingParams
    position: int
    wanted: int


@pytest.fixture(scope="module", params=[*INSTRUCTION_SETS, "no intrinsics"])
def sampler(request: pytest.FixtureRequest) -> CompiledSampler:
    """Of every instruction set that the machine has, and without any: four lanes, as NEON has."""
    if request.param in available_sets():
        return compiled_sampling.load_for(request.param)
    if request.param in INSTRUCTION_SETS or platform.machine() != "x86_64":
        pytest.skip(f"this machine does not run {request.param}")
    return CompiledSampler(load_library(SOURCE, "the test", [HEADER], (*FLAGS, "-march=x86-64")))


def noise_at(position: int, vocab_size: int) -> torch.Tensor:
    return gumbel_noise([SEED], [KEY], [position], vocab_size, CPU)[0]


def choose(
    sampler: CompiledSampler, logits_RV: torch.Tensor, params: SamplingParams, positions: Sequence[int]
) -> list[int]:
    """Each row as a sequence of its own, whose noise is that of `positions`."""
    rows = [SampledRows(Draw(SEED, KEY, params), row, 1) for row in range(len(logits_RV))]
    return sampler.choose(logits_RV, rows, [0] * len(rows), [position - 1 for position in positions])


def random_logits(vocab_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Flat and steep, with ties, in order, and with what is no finite number."""
    inf, nan = float("inf"), float("nan")

    def normal(scale: float = 3.0) -> torch.Tensor:
        return torch.randn(vocab_size, generator=generator) * scale

    def some(share: float) -> torch.Tensor:
        return torch.rand(vocab_size, generator=generator) < share

    yield from (normal(scale) for scale in (0.0, 0.3, 1.0, 3.0, 10.0, 1e30, 1e-41))
    yield normal(1e38).clamp(-3e38, 3e38)
    yield normal().round()
    yield normal() - 1e7
    yield normal().sort(descending=True).values
    yield normal().sort().values
    yield normal().masked_fill(some(0.5), -inf)
    yield normal().masked_fill(some(0.97), -inf)
    yield normal().masked_fill(some(0.05), inf)
    yield normal().masked_fill(some(0.05), nan)
    yield torch.full((vocab_size,), -inf)
    yield torch.where(some(0.5), 0.0, -0.0)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    found: list[Case] = []
    for vocab_size, num_repeats, stride in ((1, 1, 1), (7, 2, 1), (100, 2, 1), (4096, 1, 1), (151936, 1, 19)):
        noises = [noise_at(position, vocab_size) for position in range(5)]
        drawn = [logits_V for _ in range(num_repeats) for logits_V in random_logits(vocab_size, generator)]
        pairs = [(logits_V, params) for logits_V in drawn for params in PARAMS][::stride]
        for index, (logits_V, params) in enumerate(pairs):
            position = index % len(noises)
            found.append(Case(logits_V, params, position, sample(logits_V, noises[position], params)))
    return found


def test_the_compiled_sampler_draws_the_defined_token(sampler: CompiledSampler, cases: list[Case]) -> None:
    before, num_ambiguous = sampler.num_ambiguous, 0
    for case in cases:
        [token] = choose(sampler, case.logits_V[None], case.params, [case.position])
        num_ambiguous += token == AMBIGUOUS
        assert token in (case.wanted, AMBIGUOUS), (len(case.logits_V), case.params, case.logits_V)
    assert len(cases) > 4000 and sampler.num_ambiguous - before == num_ambiguous < 3


def test_what_is_too_close_to_call_is_left_to_the_definition(sampler: CompiledSampler) -> None:
    """Two tokens whose scores differ by a few units in the last place."""
    num_ambiguous = dict.fromkeys((0, 1, -1, 3, -3, 10, -10, 60, -60), 0)
    for position in range(200):
        noise_V = noise_at(position, 40)
        one, other = noise_V.topk(2).indices.tolist()
        logits_V = torch.full((40,), -50.0)
        logits_V[one] = 20.0
        even = 20.0 + noise_V[one].double() - noise_V[other].double()
        for ulps in num_ambiguous:
            logits_V[other] = even + ulps * 2.0**-19
            [token] = choose(sampler, logits_V[None], SamplingParams(1.0), [position])
            assert token in (sample(logits_V, noise_V, SamplingParams(1.0)), AMBIGUOUS)
            num_ambiguous[ulps] += token == AMBIGUOUS
    assert num_ambiguous[0] > 150 and num_ambiguous[60] == num_ambiguous[-60] == 0


def test_equal_scores_that_are_known_exactly_are_not_ambiguous(sampler: CompiledSampler) -> None:
    """Next to a logit of 1e9 noise is lost: the lowest of equals is the token."""
    logits_V = torch.full((300,), 1e9)
    logits_V[:17] = -1e9
    assert choose(sampler, logits_V[None], SamplingParams(1.0), [3]) == [17]
    assert sample(logits_V, noise_at(3, 300), SamplingParams(1.0)) == 17


def test_pytorch_is_within_half_of_the_error_that_is_allowed_for() -> None:
    """Of its float32 logarithms: words next to both ends and between, in tensors of all lengths."""
    generator = torch.Generator().manual_seed(0)
    words_V = torch.cat(
        [
            torch.randint(2**32, (1 << 20,), generator=generator),
            torch.arange(1 << 16),
            2**32 - 1 - torch.arange(1 << 16),
            (2.0 ** (torch.rand(1 << 18, generator=generator) * 32)).long(),
        ]
    )
    parts = [words_V, *words_V[: 19 * 2000].view(2000, 19)]  # of the short ones the scalar code does some
    noise_V = torch.cat([gumbel(part_V.clone()) for part_V in parts]).double()
    uniform_V = ((torch.cat(parts).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    exact_V = -torch.log(-torch.log1p(-uniform_V))
    assert ((noise_V - exact_V).abs() <= 2 * 2.0**-23 * (1.01 + exact_V.abs())).all()


def test_top_p_is_cut_at_the_very_mass(sampler: CompiledSampler) -> None:
    """Shares at which a token just is and just is not among those kept; of some noise it is the winner."""
    generator = torch.Generator().manual_seed(1)
    noises = [noise_at(position, 9) for position in range(20)]
    num_within_one = 0
    for trial in range(1500):
        logits_V = torch.randn(9, generator=generator)
        logits_V[3] = logits_V[5]
        scaled_V = (logits_V / torch.tensor(0.8)).sort(descending=True).values
        up_to_V = masses(scaled_V, scaled_V[0]).cumsum(0)
        for mass in up_to_V[:-1].tolist():
            total = int(up_to_V[-1])
            share = (mass << SHARE_BITS) // total
            # What is asked for is this mass and a part of one: it is rounded up.
            is_within_one = 0 < (share + 1) * total - (mass << SHARE_BITS) < 1 << SHARE_BITS
            num_within_one += is_within_one
            for near in (share - 1, share, share + 1) if trial < 10 else (share + 1,) * is_within_one:
                params = SamplingParams(0.8, top_p=near / 2**SHARE_BITS)
                wanted = [sample(logits_V, noise_V, params) for noise_V in noises]
                assert choose(sampler, logits_V.expand(20, 9), params, range(20)) == wanted
    assert num_within_one > 20


def test_draws_follow_the_softmax(sampler: CompiledSampler) -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    num_draws = 50_000
    for params, kept in ((SamplingParams(0.7), [0, 1, 2, 3, 4]), (SamplingParams(0.7, top_k=3), [0, 3, 4])):
        tokens = choose(sampler, logits_V.expand(num_draws, 5), params, range(num_draws))
        counts_V = torch.tensor(tokens).bincount(minlength=5)
        expected_V = torch.softmax(logits_V[kept] / 0.7, -1) * num_draws
        assert int(counts_V[kept].sum()) == num_draws
        chi_square = float(((counts_V[kept] - expected_V) ** 2 / expected_V).sum())
        assert chi_square < 18.5  # 99.9th percentile of chi-square with 4 degrees of freedom


def test_rows_are_wanted_after_the_token_chosen_before_them(sampler: CompiledSampler) -> None:
    """Two sequences among other rows: what follows a draft that is wrong is not drawn."""
    logits_WV = torch.randn(12, 50, generator=torch.Generator().manual_seed(2))[:, :47]  # rows with a stride
    params, position = SamplingParams(1.0), 8

    def drawn(row: int, depth: int, key: int = KEY) -> int:
        noise_V = gumbel_noise([SEED], [key], [position + depth + 1], 47, CPU)[0]
        return sample(logits_WV[row], noise_V, params)

    right = [drawn(row, depth) for depth, row in enumerate((2, 3, 4, 5, 6, 7))]
    wrong = (right[2] + 1) % 47
    # After a wrong draft the next is not looked at, though it is what would be drawn.
    tokens = [0, 1, 5, *right[:2], wrong, *right[3:5], 9, drawn(8, 0, 7), drawn(9, 1, 7), 0]
    positions = [0, 0, *(position + depth for depth in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3))]
    sequences = [SampledRows(Draw(SEED, KEY, params), 2, 6), SampledRows(Draw(SEED, 7, params), 8, 2)]
    wanted = [NOT_WANTED] * 12
    for row, depth, key in ((2, 0, KEY), (3, 1, KEY), (4, 2, KEY), (8, 0, 7), (9, 1, 7)):
        wanted[row] = drawn(row, depth, key)
    assert sampler.choose(logits_WV, sequences, tokens, positions) == wanted


def test_temperatures_that_float32_does_not_hold(sampler: CompiledSampler) -> None:
    """Infinite in float32: the definition's business. At the largest that is not, every logit is as good."""
    logits_V = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 100
    assert choose(sampler, logits_V[None], SamplingParams(1e39), [0]) == [AMBIGUOUS]
    wanted = [sample(logits_V, noise_at(position, 30), SamplingParams(3e38)) for position in range(20)]
    assert choose(sampler, logits_V.expand(20, 30), SamplingParams(3e38), range(20)) == wanted


def engine_texts(target: Path, make_drafter: MakeDrafter, options: dict[str, Any]) -> list[list[list[int]]]:
    """Of all prompts together, without drafts and with."""
    found = []
    for backend in ("cpu", "reference"):
        for drafter in (None, make_drafter()):
            engine = Engine.from_pretrained(target, drafter, backend=backend)  # type: ignore[arg-type]
            made = engine.generate(PROMPTS, NUM_NEW, seed=[3, 4, 5], ignore_eos=True, **options)
            found.append([generation.tokens for generation in made])
    return found


@pytest.mark.parametrize("sampling", ["temperature 1", "top-p and top-k"])
def test_text_is_equal_with_compiled_and_pytorch_sampling(
    sampling: str, tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows in compiled code, none, and every third left to the definition, with what follows it in its draft."""
    found = compiled_sampling.load_sampler()
    assert found is not None
    calls: list[int] = []
    real = found.choose

    class Doubtful:
        def choose(self, logits_WV: torch.Tensor, sequences: Sequence[SampledRows], *rows: Sequence[int]) -> list[int]:
            calls.append(len(sequences))
            tokens = real(logits_WV, sequences, *rows)
            for row in range(len(calls) % 3, len(tokens), 3):
                tokens[row] = AMBIGUOUS
            return tokens

    texts = []
    for made in (found, None, Doubtful()):
        monkeypatch.setattr(loop, "load_sampler", lambda made=made: made)
        texts.append(engine_texts(tiny_packed_dir, make_drafter, SAMPLING[sampling]))
    assert texts[0] == texts[1] == texts[2]
    assert max(calls) == len(PROMPTS), "the sequences of a round are sampled together"


def test_without_a_compiler_pytorch_samples(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled_sampling, "load_for", compiled_sampling.load_for.__wrapped__)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, logger="speedstack.runtime"):
        assert compiled_sampling.load_sampler() is None
    assert "sampling by PyTorch, because" in caplog.text and "no-such-compiler" in caplog.text

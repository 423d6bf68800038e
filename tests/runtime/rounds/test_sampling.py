"""Sampling: known random numbers, the right distribution, and nothing that depends on company."""

import math

import pytest
import torch

from speedstack.runtime.rounds.sampling import (
    WHOLE_MASS,
    SamplingParams,
    filter_logits,
    gumbel,
    gumbel_noise,
    masses,
    philox4x32,
    sample,
    sequence_key,
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's kat_vectors, philox4x32 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_samples_follow_the_softmax() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    params = SamplingParams(temperature=0.7)
    num_samples = 4000
    counts_V = torch.zeros(5)
    noise_RV = gumbel_noise([3] * num_samples, [11] * num_samples, list(range(num_samples)), 5, torch.device("cpu"))
    for noise_V in noise_RV:
        counts_V[sample(logits_V, noise_V, params)] += 1
    expected_V = torch.softmax(logits_V / 0.7, -1) * num_samples
    chi_square = float(((counts_V - expected_V) ** 2 / expected_V).sum())
    assert chi_square < 18.5  # 99.9th percentile of chi-square with 4 degrees of freedom


def test_noise_depends_on_seed_sequence_and_position_and_nothing_else() -> None:
    device = torch.device("cpu")
    rows = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2 + (1 << 32), 3), (1 + (1 << 32), 2, 3)]
    for vocab_size in (4096, 1001):  # a multiple of every vector width, and of none
        seeds, sequences, positions = (list(column) for column in zip(*rows, strict=True))
        together_RV = gumbel_noise(seeds, sequences, positions, vocab_size, device)
        assert torch.isfinite(together_RV).all()
        assert len(set(map(tuple, together_RV.tolist()))) == len(rows)
        for (seed, sequence, position), noise_V in zip(rows, together_RV, strict=True):
            alone_1V = gumbel_noise([seed], [sequence], [position], vocab_size, device)
            assert torch.equal(alone_1V[0], noise_V)


def test_noise_is_gumbels_in_both_tails() -> None:
    """Of words at both ends and between, against float64: rare tokens are drawn by what is next to 0."""
    near = torch.arange(50)
    words_V = torch.cat([near, 2 ** torch.arange(6, 32), 2**32 - 1 - 300 * near.flip(0)])
    noise_V = gumbel(words_V)
    exact_V = -torch.log(-torch.log1p(-(words_V.double() + 0.5) * 2.0**-32))
    assert torch.allclose(noise_V[:-50].double(), exact_V[:-50], rtol=1e-6, atol=1e-6)
    # A word has 24 bits in float32: at this end it moves by up to 128 of the 150 and more that 1 - v has.
    assert torch.allclose(noise_V[-50:-1].double(), exact_V[-50:-1], atol=0.06)
    assert float(noise_V[0]) == pytest.approx(33 * math.log(2), rel=1e-6)
    assert float(noise_V[-1]) == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert (noise_V.diff() <= 0).all()


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """One token of probability p among many: drawn where its exponential is about p or less."""
    noise_V = gumbel(torch.arange(4096))  # of the words whose exponentials are the least
    for probability in (5e-7, 1e-8, 1e-9):
        assert int((noise_V >= -math.log(probability)).sum()) == pytest.approx(probability * 2**32, abs=1)


def test_sequence_key_names_the_prompt() -> None:
    assert sequence_key([1, 2, 3]) == sequence_key([1, 2, 3]) != sequence_key([1, 2])
    assert sequence_key([258]) != sequence_key([2, 1])


def test_top_k_and_top_p_keep_the_most_probable_tokens() -> None:
    logits_V = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]))

    def kept(**options: float) -> list[int]:
        filtered_V = filter_logits(logits_V, SamplingParams(temperature=1.0, **options))  # type: ignore[arg-type]
        return torch.isfinite(filtered_V).nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_p=0.69) == [1, 2]
    assert kept(top_p=0.71) == [1, 2, 3]
    assert kept(top_p=1e-6) == [1]
    assert kept(top_k=3, top_p=0.5) == [1, 2]


def test_equals_of_the_last_one_kept_are_kept() -> None:
    logits_V = torch.tensor([1.0, 3.0, -0.0, 3.0, 2.0, 2.0, 0.0, 2.0])

    def kept(**options: float) -> list[int]:
        return torch.isfinite(filter_logits(logits_V, SamplingParams(1.0, **options))).nonzero()[:, 0].tolist()  # type: ignore[arg-type]

    assert kept(top_k=1) == [1, 3] and kept(top_k=3) == [1, 3, 4, 5, 7]
    assert kept(top_p=1e-9) == [1, 3] and kept(top_p=0.6) == [1, 3, 4, 5, 7]
    assert kept(top_k=7) == list(range(8)), "the two zeros are equal"
    assert kept(top_k=3, top_p=0.64) == [1, 3], "of the mass that top-k leaves: 0.645 in the first two"


def test_masses_are_integers_near_the_probabilities() -> None:
    """To 1e-6 of themselves, and one for rounding down; and these very integers, on every machine."""
    scaled_V = torch.cat([torch.linspace(25, -10, 4001), torch.tensor([25.0, float("-inf")])])
    mass_V = masses(scaled_V, scaled_V.max())
    exact_V = torch.exp(scaled_V.double() - 25) * WHOLE_MASS
    assert ((mass_V - exact_V).abs() <= 1e-6 * exact_V + 1).all()
    assert (mass_V[:4001].diff() <= 0).all() and mass_V[[0, 4001]].tolist() == [WHOLE_MASS] * 2 and mass_V[-1] == 0
    some_V = torch.tensor([0.0, -0.1, -1.0, -3.7, -12.3, -20.7, -21.5])
    assert masses(some_V, some_V.max()).tolist() == [1073741824, 971562126, 395007667, 26546682, 4887, 1, 0]


def test_top_p_is_that_of_probabilities_but_where_rounding_decides() -> None:
    """Against cumulative sums in float64, at shares in the middle of a token, which has more than 1e-5."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        logits_V = torch.randn(5003, generator=generator) * scale
        order_V = logits_V.argsort(descending=True)
        sums_V = torch.softmax(logits_V.double(), 0)[order_V].cumsum(0)
        for num_kept in (1, 2, 17, 400):
            middle = float(sums_V[num_kept - 1] - torch.softmax(logits_V.double(), 0)[order_V[num_kept - 1]] / 2)
            filtered_V = filter_logits(logits_V, SamplingParams(1.0, top_p=middle))
            assert sorted(order_V[:num_kept].tolist()) == torch.isfinite(filtered_V).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("top_p", [1e-12, 0.5, 1 - 1e-7])
def test_top_p_of_what_is_no_number_or_infinite(top_p: float) -> None:
    params, inf = SamplingParams(0.5, top_p=top_p), float("inf")
    nothing_V = torch.full((9,), -inf)
    assert torch.equal(filter_logits(nothing_V, params), nothing_V)
    assert filter_logits(torch.tensor([1.0, inf, -inf, inf]), params).tolist() == [-inf, inf, -inf, inf]
    broken_V = torch.tensor([1.0, float("nan"), 2.0])
    for broken in (params, SamplingParams(0.5, top_k=2), SamplingParams(0.5, top_p, 2)):
        assert torch.equal(filter_logits(broken_V, broken).view(torch.int32), (broken_V / 0.5).view(torch.int32))


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}])
def test_parameters_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]

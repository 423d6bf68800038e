"""The head's Triton functions alone: noise, the choice of a token, the edges of top-k and top-p.

Legend: R rows, V vocabulary, T tokens of a tile.
"""

import pytest
import torch

from speedstack.runtime.rounds import sampling
from speedstack.runtime.rounds.sampling import (
    WHOLE_MASS,
    SamplingParams,
    filter_logits,
    gumbel_noise,
    masses,
    philox4x32,
    sample,
)

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton
import triton.language as tl

from speedstack.runtime.backends.base import Draw, Rows
from speedstack.runtime.backends.gpu.buffers import row_records, sampling_records
from speedstack.runtime.backends.gpu.kernels.layers.lm_head import keep_tile
from speedstack.runtime.backends.gpu.kernels.rounds.gumbel import gumbel, uniform_words
from speedstack.runtime.backends.gpu.kernels.rounds.logit_histogram import bin_of, mass_of, steps_below
from speedstack.runtime.backends.gpu.kernels.rounds.topk_topp import find_edge, key_of, share_of
from speedstack.runtime.plan.record_layout import TEMPERATURE
from speedstack.runtime.plan.tiling import power_of_two
from speedstack.runtime.rounds.histogram import NUM_BINS, bins_of
from tests.runtime.backends.gpu.launch import Launcher

R = 4
KEYS = [11, 2**50, 13]
POSITIONS = [4, 5, 6]
INF = float("inf")


@triton.jit
def words_kernel(sampling_ptr, out_ptr, position, N: tl.constexpr):
    s0, s1 = (
        tl.load(sampling_ptr + 2).to(tl.uint32, bitcast=True),
        tl.load(sampling_ptr + 3).to(tl.uint32, bitcast=True),
    )
    k0, k1 = tl.load(sampling_ptr).to(tl.uint32, bitcast=True), tl.load(sampling_ptr + 1).to(tl.uint32, bitcast=True)
    block_N = tl.arange(0, N)
    words = uniform_words(block_N, position.to(tl.uint32), s0, s1, k0, k1)
    for lane in tl.static_range(4):
        tl.store(out_ptr + block_N * 4 + lane, words[lane].to(tl.int32, bitcast=True))


@pytest.mark.parametrize(("seed", "sequence", "position"), [(0, 0, 0), (2**64 - 1, 2**63 + 5, 70_001), (7, 2**40, 3)])
def test_noise_is_drawn_from_the_same_integers(seed: int, sequence: int, position: int, launch: Launcher) -> None:
    found = torch.empty(64, dtype=torch.int32)
    launch(
        words_kernel, (1,), sampling_records([Draw(seed, sequence, SamplingParams(1.0))], 1), found, position + 0, N=16
    )
    mask = 2**32 - 1
    counter = (torch.arange(16), *(torch.tensor(x) for x in (position, sequence & mask, sequence >> 32)))
    words = philox4x32(counter, (seed & mask, seed >> 32))
    assert torch.equal(found.long() & mask, torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten())


@triton.jit
def gumbel_kernel(words_ptr, noise_ptr, N: tl.constexpr):
    n_N = tl.arange(0, N)
    tl.store(noise_ptr + n_N, gumbel(tl.load(words_ptr + n_N).to(tl.uint32, bitcast=True)))


def test_noise_is_the_hosts_to_its_last_bits(launch: Launcher) -> None:
    """From one end of the words to the other: both logarithms and their quotient are right to a few units of 2**-24."""
    words_N = torch.cat([torch.arange(64), 2 ** torch.arange(6, 32), 2**32 - 1 - 97 * torch.arange(38)])
    noise_N = torch.empty(len(words_N))
    launch(gumbel_kernel, (1,), words_N.to(torch.int32), noise_N, N=len(words_N))
    assert torch.allclose(noise_N, sampling.gumbel(words_N), rtol=2.0**-22, atol=2.0**-21)


@triton.jit
def masses_kernel(scaled_ptr, peak, masses_ptr, bins_ptr, keys_ptr, N: tl.constexpr):
    n_N = tl.arange(0, N)
    x_N = tl.load(scaled_ptr + n_N)
    tl.store(masses_ptr + n_N, mass_of(steps_below(x_N, peak)).to(tl.int64))
    tl.store(bins_ptr + n_N, bin_of(steps_below(x_N, peak)).to(tl.int64))
    tl.store(keys_ptr + n_N, key_of(x_N))


@triton.jit
def share_kernel(totals_ptr, shares_ptr, out_ptr, N: tl.constexpr):
    n_N = tl.arange(0, N)
    tl.store(out_ptr + n_N, share_of(tl.load(totals_ptr + n_N), tl.load(shares_ptr + n_N)))


@triton.jit
def tiles_kernel(
    given_ptr, logits_ptr, best_ptr, peaks_ptr, rows_ptr, sampling_ptr, num_drawn, VOCAB: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What `lm_head` does with its product, [V, R] here."""
    tile = tl.program_id(0)
    v_T, r_R = tile * T + tl.arange(0, T), tl.arange(0, R)
    at_TR = given_ptr + v_T[:, None] * R + r_R[None, :]
    logits_TR = tl.load(at_TR, mask=(v_T < VOCAB)[:, None], other=0.0)
    keep_tile(tile, logits_TR, logits_ptr, best_ptr, peaks_ptr, rows_ptr, sampling_ptr, num_drawn, VOCAB, R, T)


@triton.jit
def edge_kernel(
    peaks_ptr, sampling_ptr, logits_ptr, bins_ptr, chains_ptr, notes_ptr, edge_ptr, VOCAB: tl.constexpr,
    NOTES: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    edge = find_edge(
        row, tl.load(peaks_ptr + row), sampling_ptr, logits_ptr, bins_ptr, chains_ptr, notes_ptr + row * NOTES, VOCAB,
        SLICE, SLICES, SP, R, C,
    )  # fmt: skip
    tl.store(edge_ptr + row, edge)


class Head:
    """Three rows of logits through `lm_head`'s tiles of T tokens, slices of a histogram, and `sample`, C at a time."""

    def __init__(
        self,
        launch: Launcher,
        logits_RV: torch.Tensor,
        params: list[SamplingParams],
        seeds: list[int],
        T: int,
        C: int,
        slices: int,
    ) -> None:
        self.launch = launch
        self.V, self.T, self.C = logits_RV.shape[1], T, C
        self.tiles, self.slice = -(-self.V // T), -(-self.V // slices)
        self.slices = -(-self.V // self.slice)
        self.rows = row_records(Rows([1] * 3, [0, 1, 2], POSITIONS), R)
        draws = [Draw(s, k, p) if p.temperature else None for s, k, p in zip(seeds, KEYS, params, strict=True)]
        self.sampling = sampling_records(draws, R)
        self.num_drawn = sum(p.temperature > 0 for p in params)
        self.logits_VR, self.peaks = torch.full((self.V, R), 7.0), torch.full((self.tiles, R), 7.0)
        self.best = torch.zeros(self.tiles, 2, R, dtype=torch.int32)
        self.bins = torch.zeros(R, 2, NUM_BINS, dtype=torch.int64)
        # Garbage, as an earlier step leaves it.
        garbage = 2**30 + 5
        self.chains = torch.full((R, self.slices, NUM_BINS + self.slice), garbage, dtype=torch.int32)
        self.notes = torch.full((R, 2 * self.V + self.tiles), garbage, dtype=torch.int32)
        given_VR = logits_RV.T.contiguous()
        pointers = (given_VR, self.logits_VR, self.best, self.peaks, self.rows, self.sampling)
        launch(tiles_kernel, (self.tiles,), *pointers, self.num_drawn, VOCAB=self.V, R=R, T=T)
        assert torch.equal(self.logits_VR.view(torch.int32), given_VR.view(torch.int32)), "logits stay what they are"
        pointers = (self.rows, self.sampling, self.logits_VR, self.peaks, self.bins, self.chains)
        self.run("logit_histogram", (R, self.slices), pointers)

    def run(self, op: str, axes: tuple[int, ...], pointers: tuple[torch.Tensor, ...]) -> None:
        sizes = {"TILES": self.tiles, "TILE": self.T, "SLICE": self.slice, "SLICES": self.slices, "SP": self.padded}
        self.launch.phase(pointers, op=op, axes=axes, VOCAB=self.V, R=R, C=self.C, REPORT=3 * R, **sizes)

    @property
    def padded(self) -> int:
        return power_of_two(self.slices)

    def has_topk_or_topp(self, params: SamplingParams) -> bool:
        return params.temperature > 0 and (0 < params.top_k < self.V or params.top_p_share > 0)

    def tokens(self) -> list[int]:
        found = torch.full((R,), -7, dtype=torch.int32)
        seen = (self.logits_VR, self.best, self.peaks, self.bins, self.chains, self.notes)
        self.run("sample", (R,), (self.rows, self.sampling, *seen, found))
        assert found[3] == -7, "an idle row"
        return found[:3].tolist()

    def edges(self) -> list[int]:
        """Keys."""
        found = torch.empty(3, dtype=torch.int32)
        peaks_R = self.peaks.amax(0) / self.sampling[:, TEMPERATURE].view(torch.float32)
        seen = (self.logits_VR, self.bins, self.chains, self.notes)
        self.launch(
            edge_kernel, (3,), peaks_R, self.sampling, *seen, found, VOCAB=self.V, NOTES=self.notes.shape[1],
            SLICE=self.slice, SLICES=self.slices, SP=self.padded, R=R, C=self.C,
        )  # fmt: skip
        return found.tolist()


def keys_of(scaled_V: torch.Tensor) -> torch.Tensor:
    """Integers of the same order."""
    bits_V = (scaled_V + 0.0).view(torch.int32)
    return bits_V ^ ((bits_V >> 31) & 0x7FFFFFFF)


def run(
    launch: Launcher,
    logits_RV: torch.Tensor,
    params: list[SamplingParams],
    seeds: list[int],
    T: int = 16,
    C: int = 64,
    slices: int = 3,
) -> list[int]:
    return Head(launch, logits_RV, params, seeds, T, C, slices).tokens()


def expected(logits_RV: torch.Tensor, params: list[SamplingParams], seeds: list[int]) -> list[int]:
    """By the host's definition; no two largest scores are within an ulp in what is tested here."""
    V = logits_RV.shape[1]
    noise_RV = gumbel_noise(seeds, KEYS, [position + 1 for position in POSITIONS], V, torch.device("cpu"))
    return [
        sample(logits_RV[row], noise_RV[row], p) if p.temperature else int(logits_RV[row].argmax())
        for row, p in enumerate(params)
    ]


def test_tokens_are_those_of_the_engine(launch: Launcher) -> None:
    """Greedy with a tie, and sampled: the same argmax as `sampling.sample` with the noise of the token's position."""
    logits_RV = torch.randn(R, 77, generator=torch.Generator().manual_seed(0))
    logits_RV[0, 70] = logits_RV[0, 20] = 9.0
    greedy = [SamplingParams()] * 3
    assert run(launch, logits_RV, greedy, [1, 2, 3]) == [20, *logits_RV[1:3].argmax(-1).tolist()]
    drawn, params = set(), [SamplingParams(t) for t in (0.7, 1.3, 5.0)]  # at which noise decides
    for seed in range(6):
        seeds = [seed, seed, 2**63 + seed]
        found = run(launch, logits_RV, params, seeds, T=16 << seed % 3)
        assert found == expected(logits_RV, params, seeds)
        drawn.add(found[1])
    assert len(drawn) > 1
    together = [SamplingParams(), SamplingParams(1.5), SamplingParams(1.5, top_k=9)]
    assert all(run(launch, logits_RV, together, [s] * 3) == expected(logits_RV, together, [s] * 3) for s in range(3))
    mixed = [SamplingParams(), SamplingParams(1.0), SamplingParams()]
    logits_RV[1, 33] = float("nan")
    assert run(launch, logits_RV, mixed, [1, 2, 3])[1] == -1
    logits_RV[1] = -INF
    assert run(launch, logits_RV, mixed, [1, 2, 3])[1] == 0, "a token of the vocabulary, whatever happens"


def test_a_score_is_the_same_in_every_tile_and_for_whatever_other_rows(launch: Launcher) -> None:
    """Bit for bit: of the best of a row nothing depends on how the vocabulary is cut, nor on who else is drawn."""
    logits_RV = torch.randn(R, 333, generator=torch.Generator().manual_seed(1))
    found = []
    for T, others in ((16, 1.0), (64, 0.3), (128, 0.0)):
        params = [SamplingParams(others), SamplingParams(0.9), SamplingParams(others, top_k=5 if others else 0)]
        best = Head(launch, logits_RV, params, [4, 5, 6], T, 64, 2).best[..., 1].view(-1, 2)
        found.append(max((float(bits.view(torch.float32)), int(index)) for bits, index in best))
    assert found[0] == found[1] == found[2]


def test_masses_are_the_hosts_integers(launch: Launcher) -> None:
    """Every one of them, near the peak, far from it, and infinite; keys order numbers as numbers are ordered."""
    generator = torch.Generator().manual_seed(0)
    near, far = torch.rand(1500, generator=generator) * 5, torch.rand(540, generator=generator) * 60
    special = torch.tensor([0.0, -0.0, -INF, 1e-30, -1e-30, 25.0, 1.0, -1e38])
    for peak in (25.0, 3.25e-3, -7.1, 1e30, INF, -INF):
        scaled = torch.cat([peak - near, peak - far, special[:7], special[7:]]).clamp(max=peak)
        found, bins = torch.empty(2, 2048, dtype=torch.int64)
        keys = torch.empty(2048, dtype=torch.int32)
        launch(masses_kernel, (1,), scaled, peak, found, bins, keys, N=2048)
        assert torch.equal(found, masses(scaled, torch.tensor(peak)))
        assert (found[scaled == peak] == WHOLE_MASS).all()
        assert torch.equal(keys, keys_of(scaled)) and torch.equal(keys[:, None] < keys, scaled[:, None] < scaled)
        assert torch.equal(bins, bins_of(scaled, torch.tensor(peak))) and (bins[scaled == peak] == 0).all()
        assert not ((scaled[:, None] > scaled) & (bins[:, None] > bins)).any(), "a larger logit in a later bin"
        assert (found[bins == NUM_BINS - 1] == 0).all() and bins.max() == (0 if peak == -INF else NUM_BINS - 1)


def test_a_share_is_exact_and_rounded_up(launch: Launcher) -> None:
    generator = torch.Generator().manual_seed(0)
    totals = torch.randint(1, 2**49, (64,), generator=generator)
    shares = torch.randint(1, 2**24, (64,), generator=generator, dtype=torch.int32)
    totals[:4], shares[:4] = torch.tensor([1, 2**24, 2**24 + 1, 2**49]), torch.tensor([1, 1, 1, 2**24 - 1])
    found = torch.empty(64, dtype=torch.int64)
    launch(share_kernel, (1,), totals, shares, found, N=64)
    assert found.tolist() == [-(-t * s // 2**24) for t, s in zip(totals.tolist(), shares.tolist(), strict=True)]


CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 60},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_p": 1 - 2**-24},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.3},
]


def some_logits(kind: str, V: int) -> torch.Tensor:
    logits_RV = torch.randn(R, V, generator=torch.Generator().manual_seed(V)) * 3
    if kind == "ties":
        return logits_RV.round()  # some of them minus zero
    if kind == "mostly -inf":
        return logits_RV.masked_fill(torch.rand(R, V, generator=torch.Generator().manual_seed(1)) < 0.95, -INF)
    if kind == "flat":  # but for one token, without which most of the mass is left
        logits_RV *= 1e-3
        logits_RV[:, 3] += 6.5
    if kind == "equal":
        logits_RV[:] = 2.5
    if kind == "peaked":
        logits_RV[:, V // 2] += 40.0
    return logits_RV


@pytest.mark.parametrize(
    ("kind", "V", "T", "C", "slices"),
    [
        ("spread", 301, 32, 64, 8),
        ("spread", 77, 4, 16, 1),  # more tiles than are looked at at a time
        ("ties", 515, 32, 128, 20),
        ("mostly -inf", 1003, 64, 256, 13),
        ("flat", 259, 16, 512, 64),
        ("peaked", 130, 128, 64, 3),
        ("equal", 131, 16, 32, 16),
    ],
)
def test_top_k_and_top_p_keep_what_the_host_keeps(
    kind: str, V: int, T: int, C: int, slices: int, launch: Launcher
) -> None:
    """The least logit that is kept, bit for bit, at vocabularies that fill no tile, and notes of several chunks."""
    logits_RV = some_logits(kind, V)
    for first in range(0, len(CUTS), 3):
        params = [SamplingParams(0.9, **cut) for cut in CUTS[first : first + 3]]  # type: ignore[arg-type]
        head = Head(launch, logits_RV, params, [1, 2, 3], T, C, slices)
        for logits_V, p, edge in zip(logits_RV, params, head.edges(), strict=False):
            if head.has_topk_or_topp(p):
                scaled_V, filtered_V = filter_logits(logits_V, SamplingParams(0.9)), filter_logits(logits_V, p)
                assert torch.equal(torch.where(keys_of(scaled_V) >= edge, scaled_V, -INF), filtered_V), (kind, p, edge)
                assert (keys_of(scaled_V) == edge).any(), "the edge is a token's"


@pytest.mark.parametrize(("kind", "T", "slices"), [("ties", 16, 3), ("flat", 32, 32), ("equal", 128, 20)])
def test_tokens_are_drawn_among_those_that_top_k_and_top_p_keep(
    kind: str, T: int, slices: int, launch: Launcher
) -> None:
    """At a temperature where the best of most tiles is dropped, and one where it is kept; whatever the cut."""
    logits_RV, different, seeds = some_logits(kind, 261), 0, [7, 8, 9]
    for first in range(0, len(CUTS), 3):
        for temperature in (0.7, 6.0):
            params = [SamplingParams(temperature, **cut) for cut in CUTS[first : first + 3]]  # type: ignore[arg-type]
            found = run(launch, logits_RV, params, seeds, T, 128, slices)
            assert found == expected(logits_RV, params, seeds)
            different += found != expected(logits_RV, [SamplingParams(temperature)] * 3, seeds)
    assert different > 0 or kind == "equal", "nothing was cut"


def test_nan_logits_and_cuts_that_keep_everything(launch: Launcher) -> None:
    """Not a number; all -inf; an infinite peak; top-k of all tokens, which is none; temperature 0 with a top-k."""
    logits_RV = torch.randn(R, 130, generator=torch.Generator().manual_seed(5))
    both = [SamplingParams(1.0, top_k=3), SamplingParams(1.0, top_p=0.5), SamplingParams(1.0, top_k=9, top_p=0.5)]
    seeds = [1, 2, 3]
    broken_RV = logits_RV.clone()
    broken_RV[:, 129] = float("nan")
    assert run(launch, broken_RV, both, seeds) == [-1] * 3
    assert run(launch, torch.full_like(logits_RV, -INF), both, seeds) == [0] * 3
    broken_RV[:, 129] = broken_RV[:, 50] = INF
    found = run(launch, broken_RV, both, seeds)
    assert found == [50] * 3 == expected(broken_RV, both, seeds), "the first of equal scores"
    all_kept = [
        SamplingParams(1.0, top_k=130),
        SamplingParams(1.0, top_k=10**12),
        SamplingParams(1.0, top_p=1 - 2**-30),
    ]
    assert run(launch, logits_RV, all_kept, seeds) == expected(logits_RV, [SamplingParams(1.0)] * 3, seeds)
    greedy = [SamplingParams(0.0, top_k=3), SamplingParams(0.0, top_p=0.1), SamplingParams()]
    assert run(launch, logits_RV, greedy, seeds) == logits_RV[:3].argmax(-1).tolist()

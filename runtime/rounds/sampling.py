"""Counter-based sampling: a token is a function of (seed, sequence, position) and the logits there.

Gumbel-max with Philox noise: `argmax(logits / temperature + gumbel)` over the tokens that top-k and top-p keep. There
is no generator state, so batch, order and speculation cannot change the output. GPU libraries and Triton use
Philox4x32-10, so kernels draw the same integers.

Top-k and top-p also agree bit for bit. Both keep every token from some logit on, ties included. Float sums depend on
their order, so top-p sums integer masses: 2**30 times a token's probability over the largest one, computed from float32
logits with integers. `backends/cpu/sampling.py` finds the same tokens faster.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), test vectors of Random123; Holtzman et
al., "The curious case of neural text degeneration" (ICLR 2020), for top-p.

Legend: V vocabulary, R rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# A logit's distance below the peak is counted in steps; OCTAVE steps halve the mass. FARTHEST, in nats, is past all
# nonzero mass and below 64 halvings. For x in [0, 1], 2**30 * 2**-x is 2**30 - x * (c[0] - x * (c[1] - ...)) with the
# coefficients below, to a relative error of 9e-8.
OCTAVE_BITS = 20
OCTAVE = 1 << OCTAVE_BITS
FARTHEST = 43.0
STEPS_A_NAT = 1.4426950408889634 * OCTAVE
WHOLE_MASS = 1 << 30
MASS_COEFFICIENTS = (744257403, 257891464, 59375084, 9884648, 1014582)
# Top-p is rounded to a multiple of 2**-SHARE_BITS.
SHARE_BITS = 24
LEAST_TEMPERATURE = 1e-4
# The largest float32 below 1. Words that round to 1 are clamped to it; the noise of 1 would be infinite.
MOST_UNIFORM = 1 - 2.0**-24


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1.0 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or a number from {LEAST_TEMPERATURE} on, got {self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")

    @cached_property
    def top_p_share(self) -> int:
        """Top-p in units of 2**-24, at least 1; 0 (not 2**24) keeps every token."""
        return max(1, round(self.top_p * 2**SHARE_BITS)) % 2**SHARE_BITS


GREEDY = SamplingParams()


def sequence_key(prompt: Sequence[int]) -> int:
    """A 64-bit key of a sequence from its prompt alone, so that the batch cannot change what is sampled."""
    data = b"".join(int(token).to_bytes(4, "little") for token in prompt)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor | int, torch.Tensor | int]
) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold uint32 values; all four counters broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The product of two uint32 wraps in int64, but its 64 bits are right.
    product = x * multiplier
    return (product >> 32) & _MASK, product & _MASK


def gumbel_noise(
    seeds: Sequence[int], sequences: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device
) -> torch.Tensor:
    """Standard Gumbel noise, float32 [R, V]: row r is a function of its seed, sequence and position."""

    def column(values: Sequence[int], shift: int = 0) -> torch.Tensor:
        return torch.tensor([(value >> shift) & _MASK for value in values], device=device)[:, None]

    block = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=device)
    counter = (block.expand(len(seeds), -1), column(positions), column(sequences), column(sequences, 32))
    words = torch.stack(philox4x32(counter, (column(seeds), column(seeds, 32))), dim=-1)
    # Row by row: torch's vectorized logarithm treats a tensor's end differently, and bits must not depend on the number
    # of rows.
    return torch.stack([gumbel(words_V.clone()) for words_V in words.flatten(1)[:, :vocab_size]])


def gumbel(words_V: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [V], from uint32 words in int64 [V].

    Float32 is fine near 0 and coarse near 1, so the exponential variable is -log(1 - v) with v near 0. Sampling
    frequencies are right down to a probability of 1e-9; -log(u) with u near 1 would stop at 1e-7.
    """
    v_V = ((words_V.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=MOST_UNIFORM)
    return -torch.log(-torch.log1p(-v_V))


def steps_below(scaled_V: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Int64 [V]: steps by which each logit lies below the peak, rounded down, at most FARTHEST."""
    below_V = (peak - scaled_V).clamp(max=FARTHEST)
    return (torch.where(scaled_V == peak, 0.0, below_V) * STEPS_A_NAT).to(torch.int64)


def masses(scaled_V: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Int64 [V]: 2**30 * exp(scaled - peak), rounded down. `peak`: the largest logit, whose mass is 2**30.

    Every device gives the same integers: only single IEEE 754 operations round before them.
    """
    steps_V = steps_below(scaled_V, peak)
    x_V = steps_V & (OCTAVE - 1)
    mass_V = torch.full_like(x_V, MASS_COEFFICIENTS[-1])
    for coefficient in (*reversed(MASS_COEFFICIENTS[:-1]), WHOLE_MASS):
        mass_V = coefficient - ((mass_V * x_V) >> OCTAVE_BITS)
    return mass_V >> (steps_V >> OCTAVE_BITS)


def filter_logits(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Float32 logits divided by the temperature; tokens that top-k or top-p drops are -inf.

    Top-k keeps the k largest, then top-p the fewest most probable tokens whose masses reach `top_p` of the rest. Both
    keep ties with the last one kept. If a logit is NaN, nothing is dropped.
    """
    # Dividing by a Python number multiplies by the reciprocal on a GPU, which is not the quotient.
    scaled_V = logits_V.float() / torch.tensor(params.temperature, dtype=torch.float32, device=logits_V.device)
    has_top_k = 0 < params.top_k < scaled_V.numel()
    if not (has_top_k or params.top_p_share) or scaled_V.isnan().any():
        return scaled_V
    if has_top_k:
        edge = torch.topk(scaled_V, params.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < edge, float("-inf"))
    if params.top_p_share:
        sorted_V = torch.sort(scaled_V[scaled_V > float("-inf")], descending=True).values
        if not len(sorted_V):
            return scaled_V
        mass_V = masses(sorted_V, sorted_V[0])
        up_to_V = torch.cumsum(mass_V, dim=0)
        needed = -((-int(up_to_V[-1]) * params.top_p_share) >> SHARE_BITS)  # rounded up
        edge = sorted_V[up_to_V - mass_V < needed][-1]
        scaled_V = scaled_V.masked_fill(scaled_V < edge, float("-inf"))
    return scaled_V


class NoiseTable:
    """Gumbel noise drawn once per (seed, sequence, position), shared by drafts and target."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._known: dict[tuple[int, int, int], torch.Tensor] = {}

    def rows(self, wanted: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Noise [V] of each (seed, sequence, position); missing ones are drawn together."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._known]
        if missing:
            seeds, sequences, positions = (list(column) for column in zip(*missing, strict=True))
            noise_RV = gumbel_noise(seeds, sequences, positions, self._vocab_size, self._device)
            self._known.update(zip(missing, noise_RV, strict=True))
        return [self._known[key] for key in wanted]


def sample(logits_V: torch.Tensor, noise_V: torch.Tensor, params: SamplingParams) -> int:
    """The token sampled from logits with its position's `gumbel_noise`. Temperature must be above 0."""
    return int(torch.argmax(filter_logits(logits_V, params) + noise_V))

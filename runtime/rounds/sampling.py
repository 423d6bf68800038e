"""Counter-based sampling: the token at a position is a function of (seed, sequence, position) and the logits there.

Gumbel-max with Philox noise: `argmax(logits / temperature + gumbel)` over the tokens that top-k and top-p keep. There
is no generator state, so it does not matter how many rows are sampled together, in which order, or whether a position
was a draft: speculation cannot change the output. Philox4x32-10 is what GPU libraries and Triton use, so a kernel can
draw the same integers.

What top-k and top-p keep is the same everywhere too, bit for bit. Both keep every token from some logit on, equals
included. Top-p adds up probabilities, and a sum of floating-point numbers depends on its order; so a token's share is
an integer here, its mass: 2**30 times its probability over the largest one, computed from float32 logits by integers
alone. Masses add up exactly in any order, and a kernel may add them as it likes.

On a CPU `compiled_sampling.py` finds the same tokens faster.

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

# Of a token's mass. How far its logit lies below the peak is counted in steps, OCTAVE of which halve the probability.
# FARTHEST, in nats, is beyond all that has any mass, and short of 64 halvings. 2**30 * 2**-x for x from 0 to 1 is
# 2**30 - x * (c[0] - x * (c[1] - ...)) with the coefficients below, to 9e-8 of itself.
OCTAVE_BITS = 20
OCTAVE = 1 << OCTAVE_BITS
FARTHEST = 43.0
STEPS_A_NAT = 1.4426950408889634 * OCTAVE
WHOLE_MASS = 1 << 30
MASS_COEFFICIENTS = (744257403, 257891464, 59375084, 9884648, 1014582)
# Top-p counts in these: what is asked for is a whole number of them.
SHARE_BITS = 24
LEAST_TEMPERATURE = 1e-4
# The float32 below 1. Words that round to 1 get it, since the noise of 1 would be infinite.
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
        """Top-p in units of 2**-24, at least one; 0, and not 2**24, keeps every token."""
        return max(1, round(self.top_p * 2**SHARE_BITS)) % 2**SHARE_BITS


GREEDY = SamplingParams()


def sequence_key(prompt: Sequence[int]) -> int:
    """64 bits that name a sequence by its prompt alone, so that a batch's make-up cannot change what is sampled."""
    data = b"".join(int(token).to_bytes(4, "little") for token in prompt)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor | int, torch.Tensor | int]
) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold unsigned 32-bit values; all four broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The product of two unsigned 32-bit numbers wraps in a signed int64, but its 64 bits are right.
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
    # Row by row: torch's vectorized logarithm treats the end of a tensor differently from its middle, and a row's bits
    # must not depend on how many rows there are.
    return torch.stack([gumbel(words_V.clone()) for words_V in words.flatten(1)[:, :vocab_size]])


def gumbel(words_V: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [V], of int64 [V] that hold unsigned 32-bit values.

    A token of probability p is drawn where an exponential variable is about p or less. Float32 is fine next to 0 and
    coarse next to 1, so the variable is -log(1 - v) of a v next to 0: tokens are drawn as often as they should be down
    to a probability of 1e-9, where -log(u) of a u next to 1 stops at 1e-7.
    """
    v_V = ((words_V.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=MOST_UNIFORM)
    return -torch.log(-torch.log1p(-v_V))


def steps_below(scaled_V: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Int64 [V]: how many steps each logit lies below the largest, FARTHEST at most; rounded down."""
    below_V = (peak - scaled_V).clamp(max=FARTHEST)
    return (torch.where(scaled_V == peak, 0.0, below_V) * STEPS_A_NAT).to(torch.int64)


def masses(scaled_V: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Int64 [V]: 2**30 * exp(scaled - peak), rounded down; `peak` is the largest of all, and equals of it have 2**30.

    Exact in that every device gives these integers: what is rounded before them is single operations of IEEE 754.
    """
    steps_V = steps_below(scaled_V, peak)
    x_V = steps_V & (OCTAVE - 1)
    mass_V = torch.full_like(x_V, MASS_COEFFICIENTS[-1])
    for coefficient in (*reversed(MASS_COEFFICIENTS[:-1]), WHOLE_MASS):
        mass_V = coefficient - ((mass_V * x_V) >> OCTAVE_BITS)
    return mass_V >> (steps_V >> OCTAVE_BITS)


def filter_logits(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Float32 logits divided by the temperature, with every token that top-k or top-p drops set to -inf.

    Top-k keeps the k largest. Top-p keeps the fewest of the most probable tokens whose masses (see the module) reach
    `top_p` of what there is after top-k. Both keep all that are equal to the last one kept; order: temperature, top-k,
    top-p. Where a logit is NaN nothing is dropped.
    """
    # Of a number, PyTorch would multiply by the reciprocal on a GPU, which is not the quotient.
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
    """Gumbel noise as it is asked for, drawn once a (seed, sequence, position): drafts and the target may share it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._known: dict[tuple[int, int, int], torch.Tensor] = {}

    def rows(self, wanted: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Noise [V] of each (seed, sequence, position); those not known yet are drawn together."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._known]
        if missing:
            seeds, sequences, positions = (list(column) for column in zip(*missing, strict=True))
            noise_RV = gumbel_noise(seeds, sequences, positions, self._vocab_size, self._device)
            self._known.update(zip(missing, noise_RV, strict=True))
        return [self._known[key] for key in wanted]


def sample(logits_V: torch.Tensor, noise_V: torch.Tensor, params: SamplingParams) -> int:
    """The token that logits predict, given `gumbel_noise` of its position. Temperature must be above 0."""
    return int(torch.argmax(filter_logits(logits_V, params) + noise_V))

"""pass@k: the chance that at least one of k programs drawn from a model passes the tests."""

import math
from collections.abc import Sequence

from speedstack.eval.lm_eval.sandbox import Limits, run_program

KS = (1, 10, 100)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate 1 - C(n - c, k) / C(n, k) for c passes among n samples (Chen et al. 2021, arXiv 2107.03374).

    Raises ValueError for fewer than k samples.
    """
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples; {num_passed} of {num_samples} passed")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def score_programs(programs: Sequence[str], limits: Limits | None = None) -> dict[str, float]:
    """pass@k of one problem's programs, tests included, for every k in `KS` with enough programs."""
    num_passed = sum(run_program(program, limits).passed for program in programs)
    return {f"pass@{k}": pass_at_k(len(programs), num_passed, k) for k in KS if k <= len(programs)}

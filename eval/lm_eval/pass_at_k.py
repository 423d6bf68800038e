"""pass@k: the chance that at least one of k programs drawn from a model passes the tests."""

import math
from collections.abc import Sequence

from speedstack.eval.lm_eval.sandbox import Limits, run_program

KS = (1, 10, 100)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate from `num_samples` programs of which `num_passed` passed (Chen et al. 2021, arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), the share of draws of k without replacement in which some program passes.
    Raises ValueError for fewer than k samples.
    """
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples; {num_passed} of {num_samples} passed")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def score_programs(programs: Sequence[str], limits: Limits | None = None) -> dict[str, float]:
    """pass@k of the programs of one problem, tests included, for every k in `KS` that there are programs for."""
    num_passed = sum(run_program(program, limits).passed for program in programs)
    return {f"pass@{k}": pass_at_k(len(programs), num_passed, k) for k in KS if k <= len(programs)}

"""Steps of the resident kernel without the host, in many orders that seeds decide: bit for bit the same.

`--interleavings` says how many, over all models together.

Legend: R rows.
"""

import pytest
import torch

from speedstack.runtime.backends.base import Rows
from tests.runtime.backends.gpu.plan_cases import SMALL_CASES, SMALL_LENGTH, prefilled
from tests.runtime.backends.gpu.resident_cases import outcome, same, small


@pytest.mark.interpret
@pytest.mark.parametrize("case", SMALL_CASES)
def test_steps_without_the_host_are_the_references_under_every_schedule(case: str, num_interleavings: int) -> None:
    """Bit for bit the same with 1, 3 and 8 programs, prefetching or not, whatever the order in which they run."""
    backend, start = small(case, 1)
    expected = outcome(backend, start, 2)
    reference, _ = prefilled(SMALL_CASES[case](), [17, 6], SMALL_LENGTH)
    rows = start[1]
    tokens = []
    for _ in range(2):
        logits_RV, best = reference.step(rows, range(2))
        rows = Rows(best, rows.slots, [position + 1 for position in rows.positions])
        tokens.append(best)
    assert expected[0] == tokens
    # float32 sums of up to 96 terms in another order, through a layer or two of values up to about 10
    torch.testing.assert_close(expected[1], logits_RV, rtol=1e-4, atol=3e-5)
    backends = [
        small(case, 3, prefetch="none")[0],
        small(case, 8)[0],
        small(case, 3)[0],
    ]
    for seed in range(num_interleavings // len(SMALL_CASES)):
        backend = backends[seed % 3]
        backend.seed = seed
        assert same(outcome(backend, start, 2), expected), f"seed {seed}, {backend.plan.num_programs} programs"

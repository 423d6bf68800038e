"""Allocation of a step's rows: one anchor per sequence, the rest for drafts, round-robin.

A step costs nearly the same whatever it holds, and early drafts are accepted more often than later ones. So a round is
one step, each sequence commits at least one token, and drafts without a row are not verified. This never takes more
steps than decoding without drafts. Texts do not depend on it.

`kernels/rounds/row_allocation.py` does the same on a GPU.
"""

from collections.abc import Sequence
from itertools import pairwise


def allocate_rows(wanted: Sequence[int], num_rows: int) -> list[int]:
    """Rows of each sequence. wanted: rows it could use, anchor included; 0 if it is finished. At most `num_rows` are
    nonzero.
    """
    allocated = [min(1, number) for number in wanted]
    num_free = num_rows - sum(allocated)
    assert num_free >= 0, "every anchor has a row"
    while num_free and allocated != list(wanted):
        for sequence, number in enumerate(wanted):
            if num_free and allocated[sequence] < number:
                allocated[sequence] += 1
                num_free -= 1
    return allocated


def contiguous_groups(num_sequences: int, num_rows: int) -> list[range]:
    """Sequences that share a step: the fewest groups with a row for every anchor, with sizes that differ by at most
    one.
    """
    num_groups = -(-num_sequences // num_rows)
    ends = [group * num_sequences // num_groups for group in range(num_groups + 1)]
    return [range(start, end) for start, end in pairwise(ends)]

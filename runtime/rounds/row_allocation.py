"""Who gets the rows of a step: one a sequence, for its anchor, and the rest for drafts, as evenly as they are wanted.

A step costs nearly the same whatever it holds, and the first draft of a sequence stands more often than its second. So
a round is one step: every sequence commits at least a token in it, drafts are given in turns (the first of every
sequence, then the second of every one, in order of sequences), and those that no row is left for are not verified.
That never takes more steps than decoding without drafts, where verifying all of them in several steps may.

`kernels.rounds.row_allocation` does the same on a GPU. Texts do not depend on it.
"""

from collections.abc import Sequence
from itertools import pairwise


def allocate_rows(wanted: Sequence[int], num_rows: int) -> list[int]:
    """Rows of each sequence. wanted: how many it could use, its anchor's included; 0 for one that is over.

    No more sequences may want any than there are rows.
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
    """Sequences that share a step: as few groups as have a row for every anchor, of sizes that differ by one."""
    num_groups = -(-num_sequences // num_rows)
    ends = [group * num_sequences // num_groups for group in range(num_groups + 1)]
    return [range(start, end) for start, end in pairwise(ends)]

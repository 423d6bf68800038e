"""Freed memory that stays in the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from speedstack.support.freed_memory import keep_freed_memory

if {keeps}:
    assert keep_freed_memory()
for step in range(6):
    if step == 3:  # by now the heap is as large as a step needs
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # A block above glibc's own limit, and many of which the last ones lie at the end of the heap.
    tensors = [torch.ones(2**24), *(torch.ones(2**20) for _ in range(8))]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def num_faults(keeps: bool) -> int:
    script = SCRIPT.format(keeps=keeps)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_a_step_freed_the_next_one_takes_without_page_faults() -> None:
    # 96 MiB a step in three steps: 70,000 small pages, or 140 huge ones.
    assert num_faults(keeps=False) > 100
    assert num_faults(keeps=True) < 20

"""Every element the documented sum, every instruction set the same bits: matmul_check.cpp and program_check.cpp."""

from functools import cache

import pytest

from speedstack.runtime.backends.cpu.kernels.build import available_sets
from tests.runtime.backends.cpu.machines import HERE, Machine, find_machine


@cache
def verdict(check: str, machine: Machine) -> list[str]:
    """The words that a check prints: "right", and what has to be the same everywhere comes last."""
    return machine.run(machine.build(HERE / f"{check}.cpp"), *(["few"] if machine.runner else [])).split()


@pytest.mark.slow
@pytest.mark.parametrize("check", ["matmul_check", "program_check"])
def test_bits_are_the_documented_ones_and_the_same_on_every_set(check: str, machine: Machine) -> None:
    found = verdict(check, machine)
    assert found[0] == "right"
    if check == "matmul_check":
        assert int(found[1]) == {"avx512": 16, "avx2": 8, "neon": 4}[machine.name]
    if available_sets():
        assert found[-1] == verdict(check, find_machine(available_sets()[0]))[-1]

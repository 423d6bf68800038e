"""The kernels' inner loops as compiled: whole vectors, for the instruction sets that this machine can compile for."""

from pathlib import Path

import pytest

from speedstack.runtime.backends.cpu.kernels.build import SOURCE
from tests.runtime.backends.cpu.assembly import vector_loops
from tests.runtime.backends.cpu.machines import Machine, find_machine

# Vectors that an inner loop of at least 16 multiply-adds keeps on the stack, a multiply-add: constants, which cost a
# load, and what 16 registers, or 32 of a quarter the width, do not hold. Measured 1.3, 0.13 and 2.7 with GCC 12.
MOST_ON_STACK = {"avx2": 2.0, "avx512": 0.25, "neon": 3.5}
# Of all inner loops together. Measured 1,217, 1,505 and 930.
LEAST_MULTIPLY_ADDS = 500

# How E2M1 values were looked up once: AVX2 cannot shuffle sixteen floats by one instruction.
SHUFFLE = """
typedef float f16 __attribute__((vector_size(64)));
typedef int i16 __attribute__((vector_size(64)));
void decode(const i16* words, const float* x, f16* y, const f16* table, int num) {
    f16 sum = {};
    for (int n = 0; n < num; n++)
        for (int j = 0; j < 8; j++) sum += __builtin_shuffle(*table, (words[n] >> 4 * j) & 15) * x[8 * n + j];
    *y = sum;
}
"""


@pytest.mark.slow
def test_inner_loops_are_of_whole_vectors(machine: Machine) -> None:
    assembly = machine.build(SOURCE, "-S", "-fPIC").read_text()
    loops = vector_loops(assembly)
    assert sum(loop.multiply_add for loop in loops) > LEAST_MULTIPLY_ADDS
    # One: a factor of an activation that is put into all lanes before they are used.
    assert not [loop for loop in loops if loop.scalar > 1]
    most = MOST_ON_STACK[machine.name]
    assert not [loop for loop in loops if loop.multiply_add >= 16 and loop.stack > most * loop.multiply_add]


def test_scalar_code_is_seen(tmp_path: Path) -> None:
    machine = find_machine("avx2")
    (tmp_path / "shuffle.cpp").write_text(SHUFFLE)
    # Contraction makes multiply-adds of these sums.
    flags = ["-S", "-ffp-contract=fast", "-Wno-psabi"]
    assembly = machine.build(tmp_path / "shuffle.cpp", *flags).read_text()
    assert max(loop.scalar for loop in vector_loops(assembly, least=1)) > 50

"""Threads that claim work: see thread_pool_check.cpp, which runs them hard, also under ThreadSanitizer; and forks."""

import os
import platform
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from speedstack.quant.kernels.build import find_compiler
from speedstack.runtime.backends.cpu.kernels.build import available_sets
from speedstack.runtime.backends.cpu.packed_layout import panels
from speedstack.runtime.backends.cpu.program import LINEAR, Program, Runner, records_of
from tests.runtime.backends.cpu.machines import HERE, Machine, find_machine

K, N, NUM_ROWS = 64, 1024, 5


@pytest.fixture
def here() -> Machine:
    available = available_sets()
    if not available:
        pytest.skip("this machine has no instruction set that the kernels are for")
    return find_machine(available[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_pool_runs_every_item_once_and_in_order(seed: int, here: Machine) -> None:
    check = here.build(HERE / "thread_pool_check.cpp", "-ldl")
    assert here.run(check, "6000", str(seed)) == "right\n"


@pytest.mark.slow
def test_no_data_races(here: Machine, tmp_path: Path) -> None:
    fixed = ["setarch", platform.machine(), "-R"]  # ThreadSanitizer of older compilers wants memory at fixed places
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }\n")
    empty = subprocess.run(
        [find_compiler("the test"), "-fsanitize=thread", str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")],
        capture_output=True,
    )
    if empty.returncode or subprocess.run([*fixed, str(tmp_path / "empty")], capture_output=True).returncode:
        pytest.skip("ThreadSanitizer does not work here")
    sanitized = Machine(here.name, here.compiler, (*here.flags, "-O1", "-g", "-fsanitize=thread"), tuple(fixed))
    check = sanitized.build(HERE / "thread_pool_check.cpp", "-ldl")
    assert sanitized.run(check, "1500", "3") == "right\n"


class Product:
    """A program of one product by eight threads, its result, and what that should be."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x_RK = torch.randn(64, K, generator=generator)
        weight_NK = torch.randn(N, K, generator=generator)
        self._y_RN, program = torch.zeros(64, N), Program()
        program.add(LINEAR, [K, N, 0, 0], (), [x_RK, panels(weight_NK), self._y_RN])
        self._kept, self._records, self._runner = program, records_of(program), Runner()
        self._found_RN, self._expected_RN = self._y_RN.numpy(), (x_RK @ weight_NK.T).numpy()

    def is_right(self) -> bool:
        self._found_RN[:] = np.nan
        rows = list(range(NUM_ROWS))
        self._runner.run(self._records, rows, rows, rows, rows, [], 8)
        return np.allclose(self._found_RN[:NUM_ROWS], self._expected_RN[:NUM_ROWS], rtol=1e-4, atol=1e-4)


def all_right(products: list[Product]) -> bool:
    """Each from a thread of its own, some times, at once."""
    verdicts = []

    def call(product: Product) -> None:
        verdicts.append(all(product.is_right() for _ in range(50)))

    threads = [threading.Thread(target=call, args=[product]) for product in products]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts == [True] * len(products)


def test_the_pool_works_for_two_callers_and_in_forked_children() -> None:
    products = [Product(seed) for seed in (1, 2)]
    assert all_right(products)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            # No thread of the parent is here, and the pool may have been at work for one of them.
            os._exit(0 if all_right(products) else 1)
        deadline = threading.Timer(60, lambda pid=child: os.kill(pid, 9))
        deadline.start()
        status = os.waitpid(child, 0)[1]
        deadline.cancel()
        assert os.waitstatus_to_exitcode(status) == 0
        assert all_right(products)


def test_the_pool_works_after_a_fork_during_work() -> None:
    products = [Product(seed) for seed in (3, 4)]
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            products[0].is_right()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if products[1].is_right() else 1)
            deadline = threading.Timer(60, lambda pid=child: os.kill(pid, 9))
            deadline.start()
            status = os.waitpid(child, 0)[1]
            deadline.cancel()
            assert os.waitstatus_to_exitcode(status) == 0
    finally:
        is_over.set()
        worker.join()

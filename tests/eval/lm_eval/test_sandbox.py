"""Programs that models write: what the sandbox keeps them from, and how their passing is counted."""

import itertools
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedstack.eval.lm_eval.pass_at_k import pass_at_k, score_programs
from speedstack.eval.lm_eval.sandbox import Limits, run_program

SHORT = Limits(seconds=20.0)


def passes(source: str, limits: Limits = SHORT) -> bool:
    return run_program(source, limits).passed


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie, which an adopted child stays until its new parent asks."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_a_program_passes_when_it_comes_to_its_end() -> None:
    assert passes("def add(a, b):\n    return a + b\nassert add(2, 3) == 5")
    assert not passes("def add(a, b):\n    return a * b\nassert add(2, 3) == 5")
    assert not passes("def add(a, b:")


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(leave: str) -> None:
    assert not passes(f"{leave}\nassert False")


def test_no_network() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        # The same lines connect outside.
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2).close()\n"
        subprocess.run([sys.executable, "-c", connect], check=True)
        assert not passes(connect)
    assert not passes("import socket; socket.socketpair()")
    # A child, and a child's child, inherit the filter.
    child = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-I', '-c', 'import socket; socket.socket()'], check=True)\n"
    )
    assert not passes(child)
    assert passes(child.replace("socket.socket()", "print()"))


def test_no_signals_to_others() -> None:
    assert not passes("import os; os.kill(os.getppid(), 9)")
    assert not passes("import os; os.setsid()")


def test_memory_and_file_size_are_limited() -> None:
    assert passes("x = bytearray(50 << 20)")
    assert not passes("x = bytearray(3 << 30)")
    assert not passes("open('x', 'wb').write(bytes(32 << 20))")


def test_nothing_of_the_caller_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert passes("import os; assert 'SECRET' not in os.environ and os.listdir('.') == []")


def test_a_program_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    sign = tmp_path / "pid"
    source = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-I', '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(sign)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    started = time.monotonic()
    assert run_program(source, Limits(seconds=6.0)).status == "timed out"
    assert time.monotonic() - started < 60
    pid = int(sign.read_text())
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, "the child outlived its program"
        time.sleep(0.05)


def test_a_program_that_prints_without_end_is_stopped() -> None:
    assert run_program("while True:\n    print('x' * 10000)", Limits(seconds=3.0)).status == "timed out"
    # The descriptor of the answer is no way out either.
    assert not passes(
        "import os\n"
        "for i in range(3, 9):\n"
        "    try:\n"
        "        os.write(i, bytes(1 << 20))\n"
        "    except OSError:\n"
        "        pass\n"
    )


def test_files_go_with_the_program(tmp_path: Path) -> None:
    before = set(os.listdir(os.path.realpath("/tmp")))
    assert passes("open('left', 'w').write('x')")
    assert not any(name.startswith("program-") for name in set(os.listdir(os.path.realpath("/tmp"))) - before)


def test_pass_at_k_is_the_share_of_draws_with_a_pass() -> None:
    for num_samples, num_passed, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 1, 4)):
        outcomes = [index < num_passed for index in range(num_samples)]
        draws = list(itertools.combinations(outcomes, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, abs=1e-12)
    # Unbiased: its mean over samples of n programs that pass with chance p is 1 - (1 - p)^k.
    rng = random.Random(0)
    p, n, k = 0.3, 8, 3
    estimates = [pass_at_k(n, sum(rng.random() < p for _ in range(n)), k) for _ in range(20000)]
    # Standard error of the mean about 0.002.
    assert sum(estimates) / len(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.01)
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples"):
        pass_at_k(2, 1, 3)


def test_programs_of_a_problem() -> None:
    assert score_programs(["assert True", "assert False"]) == {"pass@1": 0.5}
    assert score_programs(["assert False"] * 9 + ["assert True"]) == {"pass@1": pytest.approx(0.1), "pass@10": 1.0}

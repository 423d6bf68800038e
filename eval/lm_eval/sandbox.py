"""Runs a Python program that nobody has read: one that a model wrote, followed by its tests.

What holds: a process of its own in a session of its own, Python's isolated mode, an empty environment, an empty working
directory that is deleted, no output; limits of memory, processor time, file size and open files; killed with its
children at a time limit. On Linux a seccomp filter, which children inherit and nothing can remove, refuses sockets,
signals to other processes, ptrace, io_uring and leaving the session; where it cannot be installed nothing is run.

What does not hold: the file system is the user's. The program can read what the user can read and write what the user
can write. For programs worse than a small model's, run the whole evaluation in a container.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

CHILD = Path(__file__).resolve().with_name("sandbox_child.py")
ISOLATION = "limits of time, memory and files; seccomp filter without sockets and signals; file system not confined"
# What the child exits with before it runs anything; programs are told apart from it by the nonce alone.
CANNOT_ISOLATE = 97


@dataclass(frozen=True)
class Limits:
    """Of one program. `memory_bytes` bounds the address space, which libraries reserve more of than they use."""

    seconds: float = 10.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 16 << 20
    num_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """`passed`: it ran to its end. `failed`: it raised, exited early or was killed by a limit of memory or files."""

    status: Literal["passed", "failed", "timed out"]

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run `source` to its end or to a limit.

    Raises OSError where the machine has no seccomp filters: nothing was run then.
    """
    limits = limits or Limits()
    # The child says it came to the end by a word that the program does not know: leaving early is not passing.
    nonce = secrets.token_hex(16)
    task = json.dumps({"source": source, "nonce": nonce, "limits": asdict(limits)}).encode()
    # A file, not a pipe: the limit on file sizes then bounds what the program can write there.
    with tempfile.TemporaryDirectory(prefix="program-") as directory, tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env={"HOME": directory, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd=directory,
            start_new_session=True,
        )
        try:
            process.communicate(task, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome("timed out")
        finally:
            # Children of the program may be left, whether it has ended or not.
            _kill_group(process.pid)
            process.wait()
        if process.returncode == CANNOT_ISOLATE:
            raise OSError("this machine cannot keep a program from the network (no seccomp filters): nothing was run")
        answer.seek(0)
        return Outcome("passed" if answer.read(len(nonce) + 1) == nonce.encode() else "failed")


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return

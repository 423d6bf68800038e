"""A peer in a process of its own, with the interpreter of an environment that has it; see `workers/worker.py`.

Packages that pin a torch of their own, set threads for their whole process or crash do so there. The process has as
many threads as we have, and times itself.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from speedstack.eval.results.failures import PeerFailure
from speedstack.eval.speed.contestant import Sample
from speedstack.eval.speed.peers.install import ENVIRONMENT

WORKERS = Path(__file__).parent / "workers"
INSTALLED_PYTHON = ENVIRONMENT / "bin" / "python"
LOAD_SECONDS, CALL_SECONDS, CLOSE_SECONDS = 3600.0, 1800.0, 10.0


def peer_python(named: Path | None) -> Path:
    """The interpreter `named`; None: that of the environment which `make peers` makes here, or else this one."""
    if named is not None:
        return named
    return INSTALLED_PYTHON if INSTALLED_PYTHON.exists() else Path(sys.executable)


def worker_environment() -> dict[str, str]:
    """Our variables, but for what would bring our packages along, and with our number of threads."""
    threads = str(torch.get_num_threads())
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # The folder of a script is not searched for modules: what is there is no library.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        **dict.fromkeys(names, threads),
        "PYTHONSAFEPATH": "1",
    }


def check_installed(python: Path, module: str, package: str) -> None:
    """Raises PeerFailure unless the interpreter `python` finds `module`, which `package` brings; it is not imported."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        is_missing = subprocess.run([str(python), "-c", code], env=worker_environment()).returncode
    except OSError as error:
        raise no_interpreter(python, error) from error
    if is_missing:
        raise PeerFailure(f"{package} is not installed for {python}: `make peers` installs it")


def no_interpreter(python: Path, error: OSError) -> PeerFailure:
    """Why `python` could not be run."""
    return PeerFailure(f"no interpreter at {python} ({error.strerror}): `make peers` installs one")


class PeerProcess:
    """The peer `worker` (a file of `workers`), loaded with `options`, which are plain values.

    `description` is its own. Raises PeerFailure, one line, when there is no such interpreter, when the peer does not
    load or decode, and when the process ends; a process that has ended answers every later call with the same line.
    """

    def __init__(self, python: Path, worker: str, options: dict[str, Any]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._ended: str | None = None
        try:
            self._process = subprocess.Popen(
                [str(python), str(WORKERS / "worker.py"), str(WORKERS / f"{worker}_peer.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=worker_environment(),
            )
        except OSError as error:
            self._log.close()
            raise no_interpreter(python, error) from error
        try:
            self.description = str(self._ask(options, LOAD_SECONDS)["description"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, prompt: list[int], num_new_tokens: int) -> Sample:
        """One sequence; `run_batch` has the errors."""
        return self.run_batch([prompt], num_new_tokens)[0]

    def run_batch(self, prompts: list[list[int]], num_new_tokens: int) -> list[Sample]:
        """Several sequences decoded at once. Raises PeerFailure as the class says."""
        reply = self._ask({"prompts": prompts, "num_new_tokens": num_new_tokens}, CALL_SECONDS)
        return [
            Sample(tokens, [(seconds, count) for seconds, count in arrivals], reply["total_seconds"])
            for tokens, arrivals in zip(reply["tokens"], reply["arrivals"], strict=True)
        ]

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, request: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        if self._ended is not None:
            raise PeerFailure(self._ended)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        line = b""
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], timeout_seconds)[0]:
                line = process.stdout.readline()
            else:
                self._ended = f"no answer for {timeout_seconds:.0f} s"
                process.kill()
        except BrokenPipeError:
            pass  # what ended it is in its log
        if not line:
            status = process.wait()
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            self._ended = self._ended or f"its process ended with {how}{self._last_words()}"
            raise PeerFailure(self._ended)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerFailure(reply["error"])
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1].strip()[:200]}" if lines else ""

"""Command lines: error lines, exit statuses, and modules that are run by themselves.

    python -m speedstack.eval.microbench.qat --out FILE

The main function of such a module is a parser (`module_parser`), the work, and `show_result`, under `module_command`.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import ParamSpec, Protocol

EXIT_OK = 0
EXIT_SYSTEM = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

P = ParamSpec("P")


class Result(Protocol):
    """A command's measurement."""

    def save(self, path: Path) -> Path:
        """Write it as a file, atomically; returns the path."""


def error_line(error: Exception) -> str:
    """The error on one line: 'No space left on device: runs/demo' instead of '[Errno 28] ...'."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(message.split())


def exit_status(error: ValueError | OSError) -> int:
    """1 for an operating-system error, 2 for a user's mistake."""
    return EXIT_SYSTEM if isinstance(error, OSError) else EXIT_BAD_INPUT


def module_command(main: Callable[P, int | None]) -> Callable[P, int]:
    """`main` with ValueError and OSError as one line on standard error and an exit status; None is 0."""
    file = Path(inspect.getfile(main))
    name = file.parent.name if file.stem == "__main__" else file.stem

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or EXIT_OK
        except (ValueError, OSError) as error:
            print(f"{name}: error: {error_line(error)}", file=sys.stderr)
            return exit_status(error)

    return run


def module_parser(
    spec: ModuleSpec | None, documentation: str | None, out: str | None = "result file"
) -> argparse.ArgumentParser:
    """The parser of a module, from its `__spec__` and the first paragraph of its `__doc__`.

    `out` describes the option --out, the result file; None omits it.
    """
    program = None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    summary = " ".join((documentation or "").partition("\n\n")[0].split())
    parser = argparse.ArgumentParser(prog=program, description=summary)
    if out is not None:
        parser.add_argument("--out", type=Path, help=out)
    return parser


def show_result(result: Result, text: str, out: Path | None) -> None:
    """Print the result as `text`, and write it to `out` unless that is None. Raises OSError as `save`."""
    # Print first, so that a full disk does not lose the measurement.
    print(text)
    if out is not None:
        print(f"written: {result.save(out)}")

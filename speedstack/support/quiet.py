"""Keep a screen of our own while libraries talk: what they print goes to a log file, our logged warnings stay visible.

Redirection is by file descriptor, because much of the talk comes from C code and from child processes. Logging handlers
that hold the old streams write to the same descriptors, so they are covered too.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

_STDOUT, _STDERR = 1, 2


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Append everything that is printed to the file `log`; the value is a console on the real standard output.

    What `speedstack` loggers warn of appears on that console; what goes through `warnings.warn` goes to the file, like
    all else on standard error. Raises OSError when the file cannot be opened.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(_STDOUT), os.dup(_STDERR)
    with open(log, "ab", buffering=0) as file, os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8") as screen:
        console = Console(file=screen)
        handler = _ConsoleHandler(console)
        logger = logging.getLogger("speedstack")
        logger.addHandler(handler)
        os.dup2(file.fileno(), _STDOUT)
        os.dup2(file.fileno(), _STDERR)
        try:
            yield console
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((_STDOUT, _STDERR), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(level=logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(f"{record.levelname.lower()}: {record.getMessage()}", markup=False, soft_wrap=True)

"""Send libraries' output to a log file, and keep our own screen and warnings.

File descriptors are redirected, because C code and child processes print too, as do logging handlers with old streams.
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
    """Append all output to the file `log`; yields a console on the real standard output. Raises OSError.

    Warnings of `speedstack` loggers appear on that console; `warnings.warn` goes to the file.
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

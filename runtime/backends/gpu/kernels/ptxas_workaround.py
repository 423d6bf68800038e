"""Gives a first value to registers that Triton 3.6 loads under a predicate and does not set otherwise.

The last part of a reduction over several warps is loaded from shared memory by as many threads as it has elements. The
register of the others has no value then, and needs none; but the assembler takes it to keep the one that it had, from
one iteration of every loop around to the next. In the persistent kernel all reductions lie in one loop: dozens of
registers that serve nothing else, and spills. A `mov` before each such load ends that. Later versions (seen: 3.9.0)
load without a predicate, and nothing is changed.

Triton calls a hook when it knows by which stages it will compile; ours adds to the one that makes PTX. Triton 3.6 does
not count the hook in the name of what it caches on disk: kernels cached with it are taken without it too.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

_LOCK = threading.RLock()
_KEY = "speedstack: first values"
_LOAD = re.compile(r"@!?%p\d+ ld\.shared\.b(16|32|64) (%\w+), (\[[^\]]*\];)")


def with_first_values(ptx: str) -> str:
    """PTX in which every register that shared memory is loaded into under a predicate is zero before."""

    def define(load: re.Match[str]) -> str:
        bits, register, address = load.groups()
        is_address = re.search(rf"{register}\b", address)
        return load[0] if is_address else f"mov.b{bits} {register}, 0;\n\t{load[0]}"

    return _LOAD.sub(define, ptx)


@contextmanager
def first_values() -> Iterator[None]:
    """What is compiled inside has first values. A hook that somebody else has set goes on working.

    One thread at a time: the hook is the process's.
    """
    with _LOCK:
        other = knobs.runtime.add_stages_inspection_hook

        def hook(*arguments: Any) -> Any:
            if not arguments:  # asked what tells kernels of this hook from others, as text and as hash
                texts = other() if other is not None else ("", "")
                return tuple(_KEY + text for text in texts)
            if other is not None:
                other(*arguments)
            stages = arguments[1]
            make_ptx = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_first_values(make_ptx(source, metadata))
            return None

        knobs.runtime.add_stages_inspection_hook = hook
        try:
            yield
        finally:
            knobs.runtime.add_stages_inspection_hook = other

"""Initializes registers that Triton 3.6 loads under a predicate and leaves unset otherwise.

The last part of a reduction over several warps is loaded by as many threads as it has elements. The other threads'
registers need no value, but ptxas keeps their old ones alive across every loop iteration: in the persistent kernel,
dozens of registers and spills. A `mov` before each such load prevents that. Later versions (seen: 3.9.0) load without a
predicate and are left alone.

Triton's stage hook installs this for PTX. Triton 3.6 does not include the hook in its disk cache key: kernels cached
with it are also used without it.
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
    """PTX with every register that is loaded from shared memory under a predicate set to zero before."""

    def define(load: re.Match[str]) -> str:
        bits, register, address = load.groups()
        is_address = re.search(rf"{register}\b", address)
        return load[0] if is_address else f"mov.b{bits} {register}, 0;\n\t{load[0]}"

    return _LOAD.sub(define, ptx)


@contextmanager
def first_values() -> Iterator[None]:
    """Applies the workaround to kernels compiled inside the block; another hook keeps working. Not thread-safe."""
    with _LOCK:
        other = knobs.runtime.add_stages_inspection_hook

        def hook(*arguments: Any) -> Any:
            if not arguments:  # asked for the hook's cache key, as text and hash
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

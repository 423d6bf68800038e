"""Memory that a process frees and takes again at once, as training steps do: kept, without asking the system.

glibc gives large blocks back to the system as soon as they are freed, and gets them again a page fault at a time. A
training step frees and allocates hundreds of megabytes, in blocks of up to as many as the logits take; on a virtual
machine the faults were a tenth of a step.
"""

import ctypes
import logging

logger = logging.getLogger("speedstack.train")

# From glibc's malloc.h; mallopt returns 1 where it took the value.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES = 2**31 - 1
_MAX_BLOCK_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Make this process keep what it frees for what it allocates next; whether its C library can.

    For the rest of the process: its resident memory stays at its peak. Blocks above 1 GiB still go back at once.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: its allocator is another one, with habits of its own
        logger.info("the C library has no mallopt: freed memory goes back to the system")
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES))

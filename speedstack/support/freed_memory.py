"""Keep freed memory for the next allocation instead of returning it to the system.

glibc returns large blocks at once and gets them back a page fault at a time. A training step frees and allocates
hundreds of megabytes; on a virtual machine the faults were a tenth of a step.
"""

import ctypes
import logging

logger = logging.getLogger("speedstack.train")

# From glibc's malloc.h; mallopt returns 1 on success.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES = 2**31 - 1
_MAX_BLOCK_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Make this process keep freed memory; returns whether its C library can.

    Resident memory then stays at its peak. Blocks above 1 GiB still go back at once.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc, so another allocator
        logger.info("the C library has no mallopt: freed memory goes back to the system")
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES))

"""Let the C allocator keep what it frees while a loop runs on the CPU.

Every layer's output is a few megabytes; glibc takes blocks of that size from the kernel and gives them back at once, so
that a third of a step is page faults. Inside this context freed blocks stay with the process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# parameters of mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP = ((_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26))
_RELEASE = ((_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, 1 << 26), (_TOP_PAD, 0))


@contextmanager
def reused_memory(enabled: bool = True) -> Iterator[None]:
    """Keep freed memory within the block and return it to the system afterwards.

    Args:
        enabled: False does nothing; nothing is done without glibc either.

    Differs: changes no number.
    Cost: the process holds its peak memory until the block ends.
    """
    library = ctypes.CDLL(None) if enabled and sys.platform.startswith("linux") else None
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    for parameter, value in _KEEP:
        mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _RELEASE:
            mallopt(parameter, value)
        trim(0)

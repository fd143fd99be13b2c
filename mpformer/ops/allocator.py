"""Settings of the C library's allocator: memory that a step frees is kept for the next one, on CPUs.

glibc returns a tensor of more than 32 MiB to the system when it is freed, and of smaller ones what is at the
end of its heap. The next step allocates the same memory again, and the system clears and maps it page by
page: in a virtual machine, where a page costs microseconds, that was measured at a tenth of a training step.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_MOST = 2**31 - 1
_GROWTH = 64 << 20


def keep_freed_memory() -> bool:
    """From now on this process returns freed memory only in blocks of 2 GiB. False where that is impossible.

    Fragmentation may change the peak a little (measured: -3 to +2 % in a training step). Memory of torch's
    own allocators (GPUs) is unaffected. Needs glibc: does nothing on other systems.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, _GROWTH))
    return all(mallopt(key, value) == 1 for key, value in settings)

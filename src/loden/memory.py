# SPDX-License-Identifier: Apache-2.0
"""Memory that was needed for a moment goes back: an agent is judged by what it has, not by what it uses."""

import ctypes

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_BLOCK_BYTES = 128 << 10


def return_large_blocks() -> None:
    """Have the C library map large blocks apart, so that each goes back to the kernel when it is freed.

    It begins so, and stops after the first large block that is freed: from then on they share a heap with
    small ones that stay. A listing of twenty thousand leases leaves 3 MB there. A library without ``mallopt``
    is let alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)

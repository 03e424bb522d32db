"""What reading raises over a damaged file, whichever library reads: one list, so that no reader knows fewer of them."""

from __future__ import annotations

import struct
import zlib
from typing import Final

DAMAGED: Final = (  # as fuzzing found; libraries add errors of their own
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

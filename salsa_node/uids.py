"""Unique identifiers that derive from what they name, so that the same run always gets the same ones."""

from __future__ import annotations

import hashlib
import uuid
from typing import Final

from salsa_node import __version__

_NAMESPACE = uuid.UUID("6f0e1f0a-4c1d-5b0e-9a51-5a15a0000de1")


def digest(*parts: str) -> str:
    """SHA-256 (64 hex digits) of the parts, in order; `("ab", "c")` differs from `("a", "bc")`."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode()
        whole.update(len(data).to_bytes(8, "big"))
        whole.update(data)
    return whole.hexdigest()


def derive(*parts: str) -> str:
    """A UID under the 2.25 root (PS3.5 B.2) that depends on `parts` alone; at most 44 characters.

    >>> derive("run", "SEG") == derive("run", "SEG") != derive("run", "SR")
    True
    """
    return f"2.25.{uuid.uuid5(_NAMESPACE, digest(*parts)).int}"


# Who wrote a file, for its meta information (PS3.10 7.1).
IMPLEMENTATION_CLASS_UID: Final = derive("implementation class", "salsa_node")
IMPLEMENTATION_VERSION_NAME: Final = f"SALSA_NODE_{__version__}"[:16]  # a Short String

"""Where a peer's program lies on this machine: never the one of the same name that a Python package brings."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def path_of(name: str) -> str | None:
    """The program as the system has it; None where it is not installed.

    pynetdicom installs a `storescp`, an `echoscu` and a `storescu` of its own beside its interpreter, and an activated
    environment puts those first: who is measured beside DCMTK would be measured beside itself.
    """
    own = {Path(sys.executable).parent, Path(sys.prefix) / "bin"}
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder and Path(folder) not in own]
    return shutil.which(name, path=os.pathsep.join([*folders, "/usr/bin", "/usr/sbin"]))


def required(name: str) -> str:
    """The same; ends the script where it is not installed."""
    path = path_of(name)
    if path is None:
        raise SystemExit(f"{name} is not installed (scripts/peers)")
    return path

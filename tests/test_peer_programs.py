"""The programs that we are measured beside: Debian's, whatever a Python environment puts before them."""

from __future__ import annotations

import sys
from pathlib import Path

import peer_programs
import pytest


def _program(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_python_package_is_never_taken_for_the_program_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path / "environment" / "bin", "storescp")
    there = _program(tmp_path / "system", "storescp")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "bin" / "python3"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'environment' / 'bin'}:{tmp_path / 'system'}")
    assert peer_programs.path_of("storescp") == str(there)


def test_what_is_not_installed_is_named_with_what_installs_it() -> None:
    assert peer_programs.path_of("no-such-program") is None
    with pytest.raises(SystemExit, match=r"no-such-program is not installed \(scripts/peers\)"):
        peer_programs.required("no-such-program")

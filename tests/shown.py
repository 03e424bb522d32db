"""What `salsa-node show` says of a study, through the real command, as people and as programs read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDE = {"COLUMNS": "1000"}  # so that no table breaks a line


@dataclass(frozen=True)
class Shown:
    """page: of `--json`; text: of the page for people, on one line; told: on standard error."""

    page: dict[str, Any]
    text: str
    told: str

    @property
    def run(self) -> dict[str, Any]:
        """The newest run."""
        newest: dict[str, Any] = self.page["runs"][-1]
        return newest


def salsa_node(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "salsa_node", *words, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **WIDE})


def show(config: Path, study_uid: str) -> Shown:
    """Both pages; they stand for the same."""
    machine, people = salsa_node(config, "show", study_uid, "--json"), salsa_node(config, "show", study_uid)
    assert machine.returncode == people.returncode == 0, machine.stderr + people.stderr
    page, text = json.loads(machine.stdout), " ".join(people.stdout.split())
    assert text.startswith(f"study {study_uid}: {page['standing']} "), text
    return Shown(page, text, people.stderr)

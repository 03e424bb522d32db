"""The import map in the package docstring is the truth: who may know whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import salsa_node

PACKAGE = Path(salsa_node.__file__).parent
SCIENCE = (
    "volume",
    "regrid",
    "series",
    "selection",
    "pipelines",
    "findings",
    "nifti",
    "dicom_",
    "picture",
    "phantom",
    "guards",
    "placement",
    "page",
    "analysis",
)
PLUMBING = ("store", "listener", "delivery")


def allowed() -> dict[str, set[str]]:
    """room -> rooms it may import, as the docstring's map says."""
    rooms = {}
    for line in (salsa_node.__doc__ or "").splitlines():
        room, arrow, known = line.partition("<-")
        if arrow:
            rooms[room.strip()] = set(known.split())
    return rooms


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "pipelines":
        return "pipelines" if parts[1] == "__init__" else f"pipelines.{parts[1]}"
    return parts[0]


def imports_of(path: Path) -> set[str]:
    """Rooms of this package that a file imports anywhere in it, at the top or late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "salsa_node":
            tail = node.module.split(".")[1:]
            for alias in node.names:
                name = ".".join([*tail, alias.name])
                is_room = (PACKAGE / f"{name.replace('.', '/')}.py").exists() or name == "pipelines"
                found.add(name if is_room else ".".join(tail))
        elif isinstance(node, ast.Import):
            found |= {".".join(a.name.split(".")[1:]) for a in node.names if a.name.startswith("salsa_node.")}
    return {room for room in found if room}


SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts and path.parent.name != "demo_models"
)


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=room_of)
def test_a_room_imports_what_the_map_says_and_nothing_else(path):
    room = room_of(path)
    rooms = allowed()
    assert room in rooms, f"{room} is missing from the import map in salsa_node/__init__.py"
    found = imports_of(path) - {room}
    assert not found - rooms[room], f"{room} imports {sorted(found - rooms[room])}, which the map does not allow"
    assert not rooms[room] - found, f"{room} does not import {sorted(rooms[room] - found)}: the map is out of date"


def test_the_map_names_no_room_that_is_not_there():
    assert set(allowed()) == {room_of(p) for p in SOURCES} - {"__init__"}


def test_the_map_has_no_circle():
    rooms = allowed()
    done: set[str] = set()
    while len(done) < len(rooms):
        ready = {room for room, known in rooms.items() if known <= done} - done
        assert ready, f"these rooms know each other in a circle: {sorted(set(rooms) - done)}"
        done |= ready


def test_the_wings_do_not_know_each_other():
    for room, known in allowed().items():
        if room.startswith(SCIENCE):
            assert not any(k.startswith((*PLUMBING, "config", "node")) for k in known), room
        if room in PLUMBING:
            assert not any(k.startswith(SCIENCE) for k in known), room


def test_every_room_opens_by_saying_what_it_is():
    for path in SOURCES:
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        assert first.endswith((".", ":")), f"{room_of(path)}: {first!r}"


def test_no_module_outgrows_the_reader():
    long = {room_of(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert not long


@pytest.mark.parametrize("heavy", ["torch", "highdicom", "pynetdicom", "pydicom", "numpy", "nnunetv2", "scipy"])
def test_the_command_line_starts_light(heavy):
    code = f"import sys, salsa_node.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, f"salsa_node.cli pulls in {heavy}"

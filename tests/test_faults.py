"""The table of faults: every line is whole, knows the states of a study, and is held by a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

from fault_table import faults

from salsa_node.overview import Standing

TESTS = Path(__file__).parent
#: the faults that a node in a hospital must come through, by a word of their line
EXPECTED = (
    "PACS down", "slow", "refused", "warnings", "lost", "closes in the middle", "name server", "certificate", "clock",
    "locked", "disk full", "read-only", "weights vanish", "rubbish", "hangs", "memory",
)  # fmt: skip


def test_each_line_is_held_by_a_test_that_is_there():
    for fault in faults():
        module, _, name = fault.test.partition("::")
        source = (TESTS / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), fault.test


def test_each_line_says_what_is_done_and_where_the_study_stands():
    known = {standing.value for standing in Standing}
    for fault in faults():
        assert fault.node, fault.name
        assert fault.admin, fault.name
        assert fault.shown, fault.name
        assert set(fault.stands_at.split(" → ")) <= known, fault.stands_at


def test_no_fault_is_left_out():
    names = [fault.name for fault in faults()]
    assert len(names) == len(set(names))
    missing = [word for word in EXPECTED if not any(word in name for name in names)]
    assert not missing

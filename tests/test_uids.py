"""The same parts make the same UID, other parts another one."""

from __future__ import annotations

import hashlib

import pytest
from pydicom.uid import UID

from salsa_node.uids import IMPLEMENTATION_CLASS_UID, derive, digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("ab",), ("a", "b")),
        (("a",), ("a", "")),
        (("a", "b"), ("b", "a")),
        ((), ("",)),
    ],
)
def test_other_parts_make_another_digest_and_uid(one, other):
    assert digest(*one) != digest(*other)
    assert derive(*one) != derive(*other)


def test_a_digest_is_the_sha_256_of_each_part_after_its_length_in_bytes():
    parts = b"\0\0\0\0\0\0\0\x02ab" + b"\0\0\0\0\0\0\0\x02" + "ü".encode()
    assert digest("ab", "ü") == hashlib.sha256(parts).hexdigest()


def test_the_uids_of_earlier_results_stand():
    # Results once delivered are found again under these: a change here would make a second copy of each.
    assert derive("run", "SEG") == "2.25.98607804106835760565531485971950774527"
    assert IMPLEMENTATION_CLASS_UID == "2.25.338925132407576741372988495158043886566"


def test_a_derived_uid_is_one():
    made = [derive("series", str(n)) for n in range(500)]
    assert len(set(made)) == 500
    assert all(UID(uid).is_valid and len(uid) <= 44 and uid.startswith("2.25.") for uid in made)

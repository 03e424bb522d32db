from __future__ import annotations

import pytest
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.coding import Code

from salsa_node import codes

ALL = {name: code for name, code in vars(codes).items() if isinstance(code, Code)}
ALL |= {f"COUINAUD_{number}": code for number, code in codes.COUINAUD.items()}
# Not in pydicom's dictionary: the language tag, and the container of TID 1500 row 12.
BEYOND_THE_DICTIONARY = {"ENGLISH", "QUALITATIVE_EVALUATIONS"}


def meanings(code: Code) -> set[str]:
    known = concepts.get(code.scheme_designator, {})
    return {meaning for values in known.values() for value, (meaning, *_) in values.items() if value == code.value}


@pytest.mark.parametrize("name", [n for n, c in ALL.items() if c.scheme_designator != codes.PRIVATE_SCHEME])
def test_a_public_code_means_what_the_dictionary_says(name):
    if name in BEYOND_THE_DICTIONARY:
        assert not meanings(ALL[name])
    else:
        assert ALL[name].meaning in meanings(ALL[name])


def test_private_codes_fit_their_representations():
    private = [c for c in ALL.values() if c.scheme_designator == codes.PRIVATE_SCHEME]
    assert private
    assert all(len(c.value) <= 16 and len(c.meaning) <= 64 for c in private)
    assert codes.PRIVATE_SCHEME.startswith("99")


def test_no_two_concepts_share_a_code():
    assert len({(c.value, c.scheme_designator) for c in ALL.values()}) == len(ALL)

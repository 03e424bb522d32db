"""The conformance statement says what the code does: each table of it is held against the code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import allowed_warnings
import made_findings as made
import pytest
from pydicom.sr.coding import Code
from pydicom.uid import UID, CTImageStorage
from pynetdicom import AE, AllStoragePresentationContexts
from pynetdicom.presentation import build_context
from test_result_cases import objects

from salsa_node import audit_message, codes, commitment, instance_header
from salsa_node.association import VERIFICATION
from salsa_node.dicom_result import LABEL_MAP_STORAGE, Identity, Kind
from salsa_node.listener import Listener
from salsa_node.settings import ListenerSettings
from salsa_node.store import Store, StoreSettings

STATEMENT = Path(__file__).parents[1] / "deploy" / "conformance.md"


def table(*header: str, after: str = "") -> list[list[str]]:
    """The cells below the table head of these words, the first one behind `after`; code marks taken away."""
    lines = STATEMENT.read_text(encoding="utf-8").splitlines()
    start = next(n for n, text in enumerate(lines) if after in text)
    head = lines.index(f"| {' | '.join(header)} |", start)
    rows = []
    for text in lines[head + 2 :]:
        if not text.startswith("|"):
            break
        rows.append([cell.strip("`") for cell in text[2:-2].split(" | ")])
    assert rows
    return rows


def name_of(sop_class: str) -> str:
    """The dictionary's name; pydicom 3.0 has none for the newest class."""
    return "Label Map Segmentation Storage" if sop_class == LABEL_MAP_STORAGE else UID(sop_class).name


def test_the_objects_are_those_that_are_made():
    first = Identity().first_series_number
    made_so = {
        item.kind: [
            item.kind.value, str(int(item.ds.SeriesNumber) - first), item.ds.Modality, name_of(item.ds.SOPClassUID),
            str(item.ds.SOPClassUID), str(item.ds.file_meta.TransferSyntaxUID),
        ]
        for item in objects(made.case())
    }  # fmt: skip
    stated = table("kind", "+", "Modality", "SOP class", "SOP Class UID", "transfer syntax")
    assert stated == [made_so[kind] for kind in Kind]


def test_the_private_codes_are_those_in_use():
    used = [code for code in vars(codes).values() if isinstance(code, Code) and code.scheme_designator == "99SALSA"]
    stated = table("code", "meaning", "because")
    assert sorted(row[:2] for row in stated) == sorted([code.value, code.meaning] for code in used)
    assert f"Scheme `{codes.PRIVATE_SCHEME}`, *{codes.PRIVATE_SCHEME_NAME}*" in STATEMENT.read_text(encoding="utf-8")


def test_what_is_too_new_for_a_validator_is_listed_with_its_reasons():
    stated = table("message", "why it may stand", after="### dciodvfy, LABELMAP")
    assert dict(stated) == allowed_warnings.DCIODVFY_LABEL_MAP


def test_what_a_validator_says_of_the_sources_own_values_is_listed_with_its_reasons():
    stated = table("warning", "why it may stand", after="### dciodvfy, by what the source holds")
    assert dict(stated) == {text: why for of in allowed_warnings.DCIODVFY_SOURCE.values() for text, why in of.items()}


@pytest.mark.parametrize("validator", ["DCIODVFY", "DCMTK", "PIXELMED"])
def test_the_allowed_warnings_are_listed_with_their_reasons(validator):
    heading = {"DCIODVFY": "### dciodvfy", "DCMTK": "### dcmdump", "PIXELMED": "### DicomSRValidator"}[validator]
    stated = table("warning", "why it may stand", after=heading)
    assert dict(stated) == getattr(allowed_warnings, validator)


def test_the_statuses_are_those_of_the_listener():
    constants = {name: value for name, value in vars(instance_header).items() if name.isupper() and name[0] != "_"}
    statuses = [value for name, value in constants.items() if isinstance(value, int) and not name.endswith("BYTES")]
    assert [row[0] for row in table("status", "when")] == [f"0x{status:04X}" for status in sorted(statuses)]


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with (
        Store.open(StoreSettings(f"sqlite:///{tmp_path / 'record.sqlite'}"), create=True) as store,
        Listener(ListenerSettings(port=0), store, tmp_path / "data") as door,
    ):
        yield door.port


def accepted(port: int, asked: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which pairs of SOP class and transfer syntax the listener accepts, each asked for by itself."""
    found = []
    for part in range(0, len(asked), 120):  # an association has at most 128 contexts
        contexts = [build_context(sop_class, syntax) for sop_class, syntax in asked[part : part + 120]]
        assoc = AE("ANYBODY").associate("127.0.0.1", port, contexts=contexts, ae_title="SALSA_NODE")
        assert assoc.is_established
        found += [(str(c.abstract_syntax), str(c.transfer_syntax[0])) for c in assoc.accepted_contexts]
        assoc.release()
    return sorted(found)


def test_the_listener_accepts_what_the_statement_says(port):
    syntaxes = table("UID", "name")
    assert [name for _, name in syntaxes] == [UID(uid).name for uid, _ in syntaxes]
    every_class = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    patient_root_find, unknown_syntax = "1.2.840.10008.5.1.4.1.2.1.1", "1.2.3.4"
    stated = [(str(CTImageStorage), uid) for uid, _ in syntaxes]
    stated += [(sop_class, syntaxes[1][0]) for sop_class in every_class if sop_class != CTImageStorage]
    stated += [(VERIFICATION, syntaxes[1][0]), (commitment.SOP_CLASS, syntaxes[1][0])]
    not_stated = [(patient_root_find, syntaxes[1][0]), (str(CTImageStorage), unknown_syntax)]
    assert accepted(port, [*stated, *not_stated]) == sorted(stated)
    services = [row[0] for row in table("service", "role", "as")]
    assert services[0] == f"Verification (`{VERIFICATION}`)"
    assert f"Storage Commitment Push Model (`{commitment.SOP_CLASS}`)" in services


def test_the_audit_messages_are_those_that_are_sent():
    stated = [tuple(row) for row in table("action", "EventID (DCM)", "EventActionCode")]
    sent = [(begin or "any other", f"{code} {meaning}", done) for begin, code, meaning, done in audit_message.EVENTS]
    assert stated == sent

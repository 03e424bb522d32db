"""Whose a header is: of which patient and study, compared as it was read."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from salsa_node.errors import EncodingError
from salsa_node.series import WHOSE


def same_patient_and_study(obj: Dataset, source: Dataset) -> None:
    """Raises EncodingError, naming the attribute and never its value, where `obj` is not of the source's study."""
    for keyword in WHOSE:
        if differ(obj, source, Tag(keyword)):
            raise EncodingError(f"the result differs from its source in {keyword}: it is kept, not sent")


def distinct_owners(source: Iterable[Dataset]) -> list[Dataset]:
    """Of all headers that write alike whose they are the first: what `same_patient_and_study` says of it holds for all.

    Four hundred headers of one series come to one.
    """
    first: dict[tuple[object, ...], Dataset] = {}
    for ds in source:
        held = [ds.get_item(Tag(keyword)) for keyword in WHOSE]
        written = [(item.VR, item.value) if isinstance(item, RawDataElement) else repr(item) for item in held]
        first.setdefault(tuple(written), ds)
    return list(first.values())


def differ(one: Dataset, other: Dataset, tag: BaseTag) -> bool:
    """Whether two headers differ in an attribute of text: in its bytes where both hold them as read, without padding.

    An absent value and an empty one are the same.
    """
    a, b = one.get_item(tag), other.get_item(tag)
    if (a is None or isinstance(a, RawDataElement)) and (b is None or isinstance(b, RawDataElement)):
        as_read = [b"" if item is None or item.value is None else item.value.rstrip(b" \0") for item in (a, b)]
        return bool(as_read[0] != as_read[1])
    return bool((_value(one, a) or "") != (_value(other, b) or ""))


def _value(ds: Dataset, item: Dataset | DataElement | RawDataElement | None) -> object:
    """What an element of `ds` holds, in Python's terms; None where there is none."""
    if item is None:
        return None
    value: object = item.value if isinstance(item, DataElement) else ds[item.tag].value
    return value

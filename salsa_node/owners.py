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


def distinct(source: Iterable[Dataset], keywords: Iterable[str] = tuple(WHOSE)) -> list[int]:
    """Which headers write these attributes in a way of their own: of all that write alike the first.

    What `differ` says of it, it says of all; four hundred headers of one series come to one.
    """
    tags = [Tag(keyword) for keyword in keywords]
    first: dict[tuple[object, ...], int] = {}
    for k, ds in enumerate(source):
        first.setdefault(tuple(_written(ds.get_item(tag)) for tag in tags), k)
    return list(first.values())


def _written(item: Dataset | DataElement | RawDataElement | None) -> object:
    if isinstance(item, RawDataElement):
        return item.VR, item.value
    return repr(item.value) if isinstance(item, DataElement) else repr(item)


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

"""A CT series on disk: put the slices in order, check the geometry, read the voxels.

Slices are sorted by their position along the normal of Image Orientation (Patient),
never by Instance Number (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from salsa_node.uids import digest
from salsa_node.volume import CtVolume, Grid


@dataclass(frozen=True, slots=True)
class Instance:
    """One image of a series: its UID and where its file lies."""

    sop_instance_uid: str
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One CT series that is one regular volume.

    instances: in slice order, along the grid's slice axis.
    """

    study_uid: str
    series_uid: str
    instances: tuple[Instance, ...]
    grid: Grid

    @property
    def source_digest(self) -> str:
        """SHA-256 of the SOP Instance UIDs in slice order."""
        return digest(*(instance.sop_instance_uid for instance in self.instances))


def inspect(paths: Iterable[Path]) -> Series:
    """The series that these files make. Raises SeriesRejected with what was found and expected."""
    raise NotImplementedError  # written next


def read_volume(series: Series) -> CtVolume:
    """The voxels of a series in Hounsfield units. Raises SeriesRejected where an image cannot be decoded."""
    raise NotImplementedError  # written next

"""The way into a folder: one file for each object, below a folder for its study, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset

from salsa_node import durable
from salsa_node.errors import DeliveryError
from salsa_node.outgoing import Outgoing, Reference
from salsa_node.settings import Destination


class FolderWay:
    """A folder that is there; an `outgoing.Way`."""

    is_open = True

    def __init__(self, destination: Destination) -> None:
        self._name = destination.name
        self._folder = Path(destination.folder)
        if not self._folder.is_dir():
            raise DeliveryError(f"{self._name}: the folder {self._folder} is not there; make it, or mount it")

    def send(self, outgoing: Outgoing) -> tuple[int, str | None]:
        """Success, once the file is on disk. Raises DeliveryError where it cannot be written."""
        ds: Dataset = outgoing.dataset()
        try:
            durable.write(self._path(str(ds.StudyInstanceUID), outgoing.sop_instance_uid), [outgoing.content])
        except OSError as error:
            raise DeliveryError(f"{self._name}: cannot write below {self._folder}: {error.strerror}") from error
        return 0, None

    def holds(self, reference: Reference) -> bool:
        """Whether the file is there still."""
        return self._path(reference.study_uid, reference.sop_instance_uid).is_file()

    def _path(self, study_uid: str, sop_instance_uid: str) -> Path:
        return self._folder / study_uid / f"{sop_instance_uid}.dcm"

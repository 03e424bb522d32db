"""Masks that a person made: a label map in NIfTI or a DICOM Segmentation on the series' own grid.

Nothing is resampled: the file must hold the CT's voxels, in any axis order or direction, and is put
in place by its affine, never by index. What the labels mean is said by options or follows a rule
that cannot take one thing for another:

* NIfTI: 1 is the liver, every other label is lesions. A map that holds 1 alone could mean either,
  so it needs an option, unless its header says that it is this package's own map (`nifti.LABEL_MAP`):
  then every lesion was taken out of it.
* DICOM SEG: a segment whose type is Liver is the organ, other anatomy needs an option, and every
  other segment is lesions.

Options: `organ_labels`, `lesion_labels` (label values or segment numbers; with either given, only
the labels named count) and `lesion_per_label` (true: a label is one lesion even where its voxels are
not connected; false: each connected part is one). The organ always includes its lesions.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cc3d
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import SegmentationStorage
from scipy.ndimage import binary_dilation, find_objects

import salsa_node
from salsa_node.errors import ConfigError, PipelineError, SeriesRejected
from salsa_node.nifti import LABEL_MAP, read_description, read_labels
from salsa_node.pipelines import Masks, Observer, PipelineSettings, Provenance, unobserved
from salsa_node.regrid import reordering
from salsa_node.volume import CtVolume, Grid, LabelVolume

log = logging.getLogger(__name__)

ORGAN_LABEL = 1  #: the liver in a NIfTI label map, unless options say otherwise

_LABEL_MAP_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"  # DICOM Supplement 243; pydicom has no name for it
_LIVER = {("SCT", "10200004"), ("SRT", "T-62000"), ("SNM3", "T-62000")}
_ANATOMY = {("SCT", "91723000"), ("SCT", "123037004"), ("SRT", "T-D000A")}
_BACKGROUND = {("DCM", "125040")}
_UNDECODABLE = (
    InvalidDicomError,
    AttributeError,
    BytesLengthException,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
    struct.error,
)

_RIM_VOXELS = 2  # around a lesion: so wide a gap between it and the liver may a person have left
_RIM_SHARE = 0.1  # so much of that is liver around a lesion of the liver, even one that hangs on its surface

Labels = npt.NDArray[np.unsignedinteger]


class GivenMasksPipeline:
    """Gives the masks of one file as if a network had found them.

    Raises ConfigError for options it does not know, PipelineError where the file is not there.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        if settings.masks_path is None:
            raise ConfigError("given_masks needs a masks_path: a NIfTI label map or a DICOM Segmentation")
        self._path = settings.masks_path
        self._organ_labels = _label_list(settings.options, "organ_labels")
        self._lesion_labels = _label_list(settings.options, "lesion_labels")
        self._lesion_per_label = settings.options.get("lesion_per_label", False)
        unknown = set(settings.options) - {"organ_labels", "lesion_labels", "lesion_per_label"}
        if unknown or not isinstance(self._lesion_per_label, bool):
            raise ConfigError(
                "given_masks takes organ_labels, lesion_labels (lists of labels) and lesion_per_label (true or false), "
                f"found {sorted(settings.options)}"
            )
        if set(self._organ_labels or ()) & set(self._lesion_labels or ()):
            raise ConfigError("organ_labels and lesion_labels name the same label; a label is one or the other")
        self._provenance = Provenance(
            pipeline="given_masks",
            version=salsa_node.__version__,
            weights_sha256={"masks": _sha256(self._path)},
            parameters=dict(settings.options),
            by_person=True,
        )

    @property
    def provenance(self) -> Provenance:
        """The SHA-256 of the mask file stands under "masks"."""
        return self._provenance

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:  # noqa: ARG002 - nothing lies between
        """The file's masks on `ct.grid`. Raises PipelineError where they lie on another grid or say nothing clear."""
        if _sha256(self._path) != self._provenance.weights_sha256["masks"]:
            raise PipelineError(f"the mask file {self._path} changed after this run began; run again")
        read = self._from_seg if _is_dicom(self._path) else self._from_nifti
        organ, lesions = read(ct.grid)
        if organ is not None:
            _fill_in(organ, lesions)
        return Masks(
            organ=None if organ is None else LabelVolume(organ, ct.grid),
            lesions=LabelVolume(lesions, ct.grid),
            provenance=self._provenance,
            lesion_per_value=bool(self._lesion_per_label),
        )

    def unload(self) -> None:
        """Nothing is kept."""

    def _from_nifti(self, grid: Grid) -> tuple[npt.NDArray[np.uint8] | None, Labels]:
        try:
            given = read_labels(self._path)
            ours = read_description(self._path).startswith(LABEL_MAP)
        except SeriesRejected as exc:
            raise PipelineError(f"the mask file {self._path} cannot be used: {exc.reason}") from exc
        same = reordering(given.grid, grid)
        labels = same.land(given.labels, grid.shape)[1] if same else given.labels
        if same is None or labels.shape != grid.shape or labels.size != given.labels.size:
            raise PipelineError(f"the masks lie on {given.grid}, the CT on {grid}; draw or resample them on the CT")
        present = [int(v) for v in np.unique(labels) if v]
        if present == [ORGAN_LABEL] and not ours and not self._is_named():
            raise PipelineError(
                f"the label map {self._path} holds label {ORGAN_LABEL} alone: say --lesion-label {ORGAN_LABEL} where "
                f"that is lesions, --organ-label {ORGAN_LABEL} where it is the liver without lesions "
                f"(options lesion_labels and organ_labels)"
            )
        organ_labels, lesion_labels = self._meaning_of_labels(present)
        organ = np.isin(labels, organ_labels).astype(np.uint8) if organ_labels else None
        return organ, np.where(np.isin(labels, lesion_labels), labels, 0).astype(labels.dtype)

    def _is_named(self) -> bool:
        """Whether options say which labels count."""
        return self._organ_labels is not None or self._lesion_labels is not None

    def _meaning_of_labels(self, present: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which of the labels present are the organ, and which are lesions."""
        if not self._is_named():
            return [v for v in present if v == ORGAN_LABEL], [v for v in present if v != ORGAN_LABEL]
        organ, lesions = (self._organ_labels or ()), (self._lesion_labels or ())
        if not set(present) & {*organ, *lesions}:
            raise PipelineError(
                f"the mask file {self._path} holds labels {list(present)}, none of those named: {[*organ, *lesions]}"
            )
        return list(organ), list(lesions)

    def _from_seg(self, grid: Grid) -> tuple[npt.NDArray[np.uint8] | None, Labels]:
        segments, frames = _read_seg(self._path, grid)
        organ_numbers, lesion_numbers = self._meaning_of_segments(segments)
        organ = np.zeros(grid.shape, dtype=np.uint8) if organ_numbers else None
        lesions = np.zeros(grid.shape, dtype=np.uint16)
        overlaps: set[tuple[int, int]] = set()
        for frame, number in product(frames, [*organ_numbers, *lesion_numbers]):
            landed = frame.on(grid, number)
            if landed is None:
                continue
            into, mask = landed
            if number in organ_numbers and organ is not None:
                organ[into] |= mask
            else:
                there = lesions[into]
                overlaps |= {(int(other), number) for other in np.unique(there[mask]) if other not in (0, number)}
                there[mask & (there == 0)] = number
        return organ, _join(lesions, overlaps)

    def _meaning_of_segments(self, segments: Mapping[int, _Segment]) -> tuple[list[int], list[int]]:
        """Numbers of the segments that are the organ, and of those that are lesions."""
        if 0 in segments:
            raise PipelineError("segment 0 is not the background; number the segments from 1")
        if self._is_named():
            organ, lesions = self._meaning_of_labels(sorted(segments))
            return [n for n in organ if n in segments], [n for n in lesions if n in segments]
        organ = [n for n, segment in segments.items() if segment.property_type in _LIVER]
        lesions = [n for n in segments if n not in organ]
        for number in lesions:
            if segments[number].category in _ANATOMY:
                raise PipelineError(
                    f"segment {number} is {segments[number].meaning}: neither the liver nor a lesion; "
                    f"name the segments that count with --organ-label and --lesion-label "
                    f"(options organ_labels and lesion_labels)"
                )
        return organ, lesions


def _fill_in(organ: npt.NDArray[np.uint8], lesions: Labels) -> None:
    """Make liver (1) of what was drawn in the liver in place of it; a lesion drawn elsewhere stays outside of it."""
    parts = cc3d.connected_components(lesions > 0, connectivity=26)
    for number, box in enumerate(find_objects(parts), start=1):
        place = tuple(slice(max(0, side.start - _RIM_VOXELS), side.stop + _RIM_VOXELS) for side in box)
        part = parts[place] == number
        rim = binary_dilation(part, np.ones((3, 3, 3)), iterations=_RIM_VOXELS) & ~part
        if np.count_nonzero(organ[place][rim]) >= _RIM_SHARE * np.count_nonzero(rim):
            organ[place][part] = 1


def _label_list(options: Mapping[str, object], name: str) -> tuple[int, ...] | None:
    given = options.get(name)
    if given is None:
        return None
    labels = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not all(isinstance(label, int) and not isinstance(label, bool) and label > 0 for label in labels):
        raise ConfigError(f"{name} must be a list of labels (1, 2, ...), found {given!r}")
    return tuple(label for label in labels if isinstance(label, int))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise PipelineError(f"the mask file {path} cannot be read: {exc.strerror}") from exc


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


@dataclass(frozen=True, slots=True)
class _Segment:
    """What a segment is; both codes as (scheme, value)."""

    category: tuple[str, str]
    property_type: tuple[str, str]
    meaning: str


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """One frame of a Segmentation.

    segment: the segment that it shows; None where the pixel values are segment numbers (LABELMAP).
    pixels: (1, rows, columns), as stored. plane: where they lie.
    """

    segment: int | None
    pixels: Labels
    plane: Grid

    def on(self, grid: Grid, number: int) -> tuple[tuple[slice, slice, slice], npt.NDArray[np.bool_]] | None:
        """Where on the grid this frame shows the segment of that number, and which voxels; None if it does not."""
        mask = np.asarray(self.pixels == number if self.segment is None else self.pixels > 0).astype(np.uint8)
        if self.segment not in (None, number) or not mask.any():
            return None
        same = reordering(self.plane, grid)
        if same is None:
            raise PipelineError(f"a frame of the Segmentation lies between the CT's voxels: {self.plane} in {grid}")
        into, shown = same.land(mask, grid.shape)
        if np.count_nonzero(shown) != np.count_nonzero(mask):
            raise PipelineError(f"a frame of the Segmentation reaches outside the CT: {self.plane} in {grid}")
        return into, shown > 0


def _read_seg(path: Path, grid: Grid) -> tuple[dict[int, _Segment], list[_Frame]]:
    """The segments, less the background, and frames of a Segmentation in the frame of reference of `grid`."""
    syntax = "an unknown transfer syntax"
    try:
        ds = pydicom.dcmread(path)
        syntax = f"transfer syntax {ds.file_meta.get('TransferSyntaxUID')}"
        if ds.SOPClassUID not in (SegmentationStorage, _LABEL_MAP_SEGMENTATION_STORAGE):
            raise PipelineError(f"the mask file {path} is DICOM of SOP class {ds.SOPClassUID}; expected a Segmentation")
        if ds.SegmentationType not in ("BINARY", "LABELMAP"):
            raise PipelineError(f"a {ds.SegmentationType} Segmentation; expected BINARY or LABELMAP")
        uid = ds.get("FrameOfReferenceUID")
        if grid.frame_of_reference_uid not in (None, uid):
            raise PipelineError(
                f"the Segmentation is in frame of reference {uid}, the CT in {grid.frame_of_reference_uid}"
            )
        pixels = ds.pixel_array
        pixels = pixels.reshape(-1, 1, *pixels.shape[-2:])
        shared = ds.SharedFunctionalGroupsSequence[0]
        items = zip(ds.PerFrameFunctionalGroupsSequence, pixels, strict=True)
        frames = [_frame(ds, [own, shared], image, grid) for own, image in items]
        segments = {int(item.SegmentNumber): _segment(item) for item in ds.SegmentSequence}
    except _UNDECODABLE as exc:
        raise PipelineError(f"the Segmentation {path} cannot be read ({syntax}, {type(exc).__name__})") from exc
    return {number: s for number, s in segments.items() if s.property_type not in _BACKGROUND}, frames


def _frame(ds: pydicom.Dataset, groups: Sequence[pydicom.Dataset], pixels: Labels, grid: Grid) -> _Frame:
    """groups: the frame's own functional groups, then the shared ones."""

    def group(name: str) -> pydicom.Dataset:
        found: pydicom.Dataset = next(items[name] for items in groups if name in items).value[0]
        return found

    by_value = ds.SegmentationType == "LABELMAP"
    orientation = [float(x) for x in group("PlaneOrientationSequence").ImageOrientationPatient]
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    between_rows, between_columns = (float(x) for x in group("PixelMeasuresSequence").PixelSpacing)
    # A frame is one slice thick. Its step to the next one is the grid's own along the axis that
    # stands most upright on the frame, so that only the frame's plane decides whether it fits.
    steps = grid.affine_lps_mm[:3, :3]
    upright = int(np.argmax(np.abs(np.cross(row, column) @ (steps / np.linalg.norm(steps, axis=0)))))
    affine = np.eye(4)
    affine[:3, :3] = np.stack([steps[:, upright], column * between_rows, row * between_columns], axis=1)
    affine[:3, 3] = [float(x) for x in group("PlanePositionSequence").ImagePositionPatient]
    return _Frame(
        segment=None if by_value else int(group("SegmentIdentificationSequence").ReferencedSegmentNumber),
        pixels=pixels,
        plane=Grid((1, pixels.shape[1], pixels.shape[2]), affine, ds.get("FrameOfReferenceUID")),
    )


def _segment(item: pydicom.Dataset) -> _Segment:
    category, property_type = item.SegmentedPropertyCategoryCodeSequence[0], item.SegmentedPropertyTypeCodeSequence[0]
    return _Segment(
        category=(str(category.get("CodingSchemeDesignator")), str(category.get("CodeValue"))),
        property_type=(str(property_type.get("CodingSchemeDesignator")), str(property_type.get("CodeValue"))),
        meaning=str(property_type.get("CodeMeaning")),
    )


def _join(lesions: npt.NDArray[np.uint16], overlaps: Iterable[tuple[int, int]]) -> npt.NDArray[np.uint16]:
    """Segments that overlap become one value: a voxel that is in both cannot lie in two lesions."""
    value = np.arange(int(lesions.max()) + 1, dtype=np.uint16)
    for pair in overlaps:
        log.warning(
            "lesion segments overlap and count as one",
            extra={"event": "masks.segments_overlap", "segments": sorted(pair)},
        )
        low, high = sorted(int(value[number]) for number in pair)
        value[value == high] = low
    return value[lesions]

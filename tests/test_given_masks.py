"""Masks that a person made reach the CT's voxels, or are refused with what does not fit."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from made_series import TURNED, files, given_uids, made
from pydicom.sr.coding import Code

from salsa_node import dicom_seg, guards, phantom, pipelines
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity
from salsa_node.errors import ConfigError, PipelineError
from salsa_node.findings import Disease, measure
from salsa_node.limits import Limits
from salsa_node.nifti import LABEL_MAP, read_labels, write_labels
from salsa_node.pipelines import DEMO_NOTICE, Masks, Pipeline, PipelineSettings, Provenance
from salsa_node.regrid import onto
from salsa_node.series import headers, inspect, read_volume
from salsa_node.volume import CtVolume, Grid, LabelVolume

LIVER = Code("10200004", "SCT", "Liver")
SPLEEN = Code("78961009", "SCT", "Spleen")
LESION = Code("52988006", "SCT", "Lesion")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
TISSUE = Code("85756007", "SCT", "Tissue")
BIG, SMALL, TOUCHING = np.s_[1:4, 2:7, 1:6], np.s_[4:5, 9:11, 8:9], np.s_[1:4, 7:9, 1:4]


def given(path: Path, **options: object) -> Pipeline:
    return pipelines.load("given_masks", PipelineSettings(masks_path=path, options=options))


def refusal(ct: CtVolume, path: Path, **options: object) -> str:
    with pytest.raises(PipelineError) as caught:
        given(path, **options).segment(ct)
    return str(caught.value)


@pytest.fixture
def ct(tmp_path) -> CtVolume:
    """Six oblique slices of 12 x 10 voxels, read from disk."""
    _, paths = made(tmp_path / "ct", TURNED)
    return read_volume(inspect(paths))


def drawn(shape: tuple[int, ...], **boxes: tuple[slice, ...]) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    for name, box in boxes.items():
        labels[box] = int(name[1:])
    return labels


def nifti(folder: Path, labels: np.ndarray, grid: Grid, name: str = "masks.nii.gz") -> Path:
    write_labels(LabelVolume(labels, grid), folder / name)
    return folder / name


# NIfTI ---------------------------------------------------------------------------------------------------------------


def test_label_1_is_the_liver_and_the_rest_are_lesions(ct, tmp_path):
    labels = drawn(ct.grid.shape, _1=np.s_[0:6, 1:11, 0:9], _2=BIG, _7=TOUCHING, _3=SMALL)
    masks = given(nifti(tmp_path, labels, ct.grid)).segment(ct)
    assert np.array_equal(masks.lesions.labels, np.where(labels > 1, labels, 0))
    assert masks.organ is not None
    assert np.array_equal(masks.organ.labels, labels > 0)  # the liver includes what was drawn inside it
    assert masks.lesions.grid is ct.grid
    assert [lesion.voxels for lesion in measure(ct, masks, Criteria()).lesions] == [75, 18, 2]


def test_a_lesion_drawn_elsewhere_is_no_part_of_the_liver_and_is_flagged(tmp_path):
    patient = phantom.make(phantom.Recipe(2, shape=(32, 96, 96), spacing_mm=(6.0, 3.0, 3.0)))
    liver = patient.liver.labels == 1
    labels = np.where(patient.lesion_labels.labels > 0, 2, liver).astype(np.uint8)
    labels[4:7, 2:6, 2:6] = 3  # in the air
    assert not liver[4:7, 2:6, 2:6].any()
    assert np.count_nonzero(labels == 2) > 300
    masks = given(nifti(tmp_path, labels, patient.ct.grid)).segment(patient.ct)
    assert masks.organ is not None
    assert np.array_equal(masks.organ.labels == 1, liver)  # with the lesions in it, without the one in the air
    findings = measure(patient.ct, masks, Criteria())
    far = [flag.text for flag in guards.flags(patient.ct, findings, Limits()) if flag.name == "lesion_outside_liver"]
    assert len(far) == 1
    assert "0 % of it within" in far[0]


def test_any_storage_of_the_grid_is_put_in_its_place(ct, tmp_path):
    labels = drawn(ct.grid.shape, _2=BIG, _3=SMALL)
    affine = ct.grid.affine_lps_mm[:, [2, 0, 1, 3]].copy()
    affine[:, 3] += affine[:, 0] * 9  # columns run the other way
    affine[:, 0] *= -1
    stored = LabelVolume(labels.transpose(2, 0, 1)[::-1], Grid((10, 6, 12), affine))
    write_labels(stored, tmp_path / "m.nii")
    assert np.array_equal(given(tmp_path / "m.nii").segment(ct).lesions.labels, labels)


def test_another_grid_is_refused_naming_both(ct, tmp_path):
    for shape, shift in (
        ((6, 12, 10), (0.5, 0, 0)),
        ((6, 12, 9), (0, 0, 0)),
        ((6, 12, 11), (0, 0, 0)),
        ((6, 12, 10), (1, 0, 0)),
    ):
        affine = ct.grid.affine_lps_mm.copy()
        affine[:3, 3] = ct.grid.to_lps_mm(shift)
        words = refusal(ct, nifti(tmp_path, np.full(shape, 2, np.uint8), Grid(shape, affine)))
        assert f"a grid of {' x '.join(map(str, shape))} " in words
        assert str(ct.grid) in words
        assert "the masks lie on" in words


def test_one_label_alone_could_be_either_and_is_asked_for(ct, tmp_path):
    path = nifti(tmp_path, drawn(ct.grid.shape, _1=BIG), ct.grid)
    words = refusal(ct, path)
    assert "say --lesion-label 1 where that is lesions, --organ-label 1 where it is the liver" in words
    as_lesions = given(path, lesion_labels=[1]).segment(ct)
    assert as_lesions.organ is None
    assert as_lesions.lesions.labels.sum() == 75
    as_liver = given(path, organ_labels=[1]).segment(ct)
    assert as_liver.organ is not None
    assert as_liver.organ.labels.sum() == 75
    assert not as_liver.lesions.labels.any()


@pytest.mark.parametrize("mark", ["", Provenance("demo", "1", notice=DEMO_NOTICE).mark])
def test_our_own_map_with_every_lesion_erased_says_that_there_is_none(ct, tmp_path, mark):
    path = tmp_path / "labels.nii.gz"
    write_labels(LabelVolume(drawn(ct.grid.shape, _1=BIG), ct.grid), path, f"{LABEL_MAP}{mark}")
    masks = given(path).segment(ct)
    assert masks.organ is not None
    assert masks.organ.labels.sum() == 75
    assert not masks.lesions.labels.any()
    assert given(path, lesion_labels=[1]).segment(ct).lesions.labels.sum() == 75  # a person's word goes first
    write_labels(LabelVolume(drawn(ct.grid.shape, _1=BIG, _3=SMALL), ct.grid), path, LABEL_MAP)
    assert np.unique(given(path).segment(ct).lesions.labels).tolist() == [0, 3]


def test_an_empty_map_says_that_there_is_no_lesion(ct, tmp_path):
    masks = given(nifti(tmp_path, np.zeros(ct.grid.shape, np.uint8), ct.grid)).segment(ct)
    assert masks.organ is None
    assert not masks.lesions.labels.any()


def test_with_options_only_the_labels_named_count(ct, tmp_path):
    path = nifti(tmp_path, drawn(ct.grid.shape, _5=np.s_[0:6, 0:9], _2=BIG, _3=SMALL), ct.grid)
    masks = given(path, organ_labels=[5], lesion_labels=[2, 9]).segment(ct)
    assert set(np.unique(masks.lesions.labels)) == {0, 2}
    assert masks.organ is not None
    assert masks.organ.labels.sum() == 6 * 9 * 10
    assert "holds labels [2, 3, 5], none of those named: [9]" in refusal(ct, path, lesion_labels=[9])


def test_a_lesion_in_two_pieces_is_one_if_the_person_says_so(ct, tmp_path):
    path = nifti(tmp_path, drawn(ct.grid.shape, _2=np.s_[0:1, 0:2, 0:2], _1=np.s_[3:4, 5:6, 5:6]), ct.grid)
    pieces = np.s_[5:6, 11:12, 9:10]
    labels = read_labels(path).labels.copy()
    labels[pieces] = 2
    path = nifti(tmp_path, labels, ct.grid)
    assert [x.voxels for x in measure(ct, given(path).segment(ct), Criteria()).lesions] == [4, 1]
    assert [x.voxels for x in measure(ct, given(path, lesion_per_label=True).segment(ct), Criteria()).lesions] == [5]


def test_a_file_that_is_no_label_map_is_refused(ct, tmp_path):
    text = tmp_path / "masks.nii.gz"
    text.write_text("liver")
    assert f"the mask file {text} cannot be used: the file cannot be read as NIfTI" in refusal(ct, text)


# DICOM SEG -----------------------------------------------------------------------------------------------------------


def written_seg(
    folder: Path, segments: list[tuple[Code, Code, np.ndarray]], kind: str = "BINARY", turn=lambda volume: volume
) -> Path:
    """A Segmentation by highdicom itself of the series in `folder`/ct; turn: stores it in another orientation."""
    series = inspect(sorted((folder / "ct").iterdir()))
    source = headers(series)
    if kind == "LABELMAP":
        array = np.zeros(series.grid.shape, np.uint8)
        for number, (_, _, mask) in enumerate(segments, start=1):
            array[mask > 0] = number
    else:
        array = np.stack([mask for _, _, mask in segments], axis=-1).astype(np.uint8)
    volume = turn(
        hd.Volume(
            array,
            series.grid.affine_lps_mm,
            "PATIENT",
            source[0].FrameOfReferenceUID,
            channels=None
            if array.ndim == 3
            else {hd.ChannelDescriptor("segment", value_type=int, is_custom=True): list(range(1, array.shape[-1] + 1))},
        )
    )
    algorithm = hd.AlgorithmIdentificationSequence("drawn", Code("113085", "DCM", "Spatial resampling"), "1")
    descriptions = [
        hd.seg.SegmentDescription(n, f"segment {n}", category, what, "AUTOMATIC", algorithm)
        for n, (category, what, _) in enumerate(segments, start=1)
    ]
    seg = hd.seg.Segmentation(
        source,
        volume if array.ndim == 3 else volume.array,
        kind,
        descriptions,
        "2.25.77",
        9,
        "2.25.78",
        1,
        "somebody",
        "something",
        "1",
        "1",
        pixel_measures=volume.get_pixel_measures() if array.ndim == 4 else None,
        plane_orientation=volume.get_plane_orientation() if array.ndim == 4 else None,
        plane_positions=volume.get_plane_positions() if array.ndim == 4 else None,
    )
    seg.save_as(folder / "seg.dcm")
    return folder / "seg.dcm"


TURNS = {
    "as it is": lambda volume: volume,
    "from head to feet": lambda volume: volume.flip_spatial(0),
    "columns reversed": lambda volume: volume.flip_spatial(2),
    "rows and columns exchanged": lambda volume: volume.permute_spatial_axes([0, 2, 1]),
    "re-cut along the rows": lambda volume: volume.permute_spatial_axes([1, 0, 2]),
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_segments_are_put_where_their_planes_say(turn, ct, tmp_path):
    shape = ct.grid.shape
    liver, one, two = drawn(shape, _1=np.s_[1:6, 1:9]), drawn(shape, _1=BIG), drawn(shape, _1=SMALL)
    path = written_seg(tmp_path, [(ANATOMY, LIVER, liver), (ABNORMAL, LESION, one), (TISSUE, TISSUE, two)], turn=turn)
    masks = given(path).segment(ct)
    assert np.array_equal(masks.lesions.labels, one * 2 + two * 3)
    assert masks.organ is not None
    assert np.array_equal(masks.organ.labels, liver | two)


def test_a_label_map_segmentation_is_read_by_its_values(ct, tmp_path):
    shape = ct.grid.shape
    parts = [(ANATOMY, LIVER, drawn(shape, _1=np.s_[1:6, 1:9])), (ABNORMAL, LESION, drawn(shape, _1=BIG))]
    masks = given(written_seg(tmp_path, parts, "LABELMAP")).segment(ct)
    assert np.array_equal(masks.lesions.labels, parts[1][2] * 2)
    assert masks.organ is not None
    assert np.array_equal(masks.organ.labels, parts[0][2])


def test_segments_that_overlap_are_one_lesion_and_said_so(ct, tmp_path, caplog):
    shape = ct.grid.shape
    boxes = [np.s_[1:3, 1:4, 1:4], np.s_[2:4, 3:6, 3:6], np.s_[3:5, 5:8, 5:8], np.s_[5:6, 0:2, 8:10]]
    parts = [(ABNORMAL, LESION, drawn(shape, _1=box)) for box in boxes]
    with caplog.at_level(logging.WARNING):
        masks = given(written_seg(tmp_path, parts)).segment(ct)
    assert [r.segments for r in caplog.records if r.event == "masks.segments_overlap"] in (
        [[1, 2], [2, 3]],
        [[2, 3], [1, 2]],
    )
    joined = np.any([mask for _, _, mask in parts[:3]], axis=0)
    assert np.array_equal(masks.lesions.labels, joined * 1 + parts[3][2] * 4)


def test_other_anatomy_is_asked_for(ct, tmp_path):
    shape = ct.grid.shape
    path = written_seg(tmp_path, [(ANATOMY, SPLEEN, drawn(shape, _1=BIG)), (ABNORMAL, LESION, drawn(shape, _1=SMALL))])
    assert "segment 1 is Spleen: neither the liver nor a lesion" in refusal(ct, path)
    assert "name the segments that count with --organ-label and --lesion-label" in refusal(ct, path)
    masks = given(path, lesion_labels=[2]).segment(ct)
    assert masks.organ is None
    assert masks.lesions.labels.sum() == 2 * 2
    assert "none of those named: [4]" in refusal(ct, path, organ_labels=[4])


def test_the_nodes_own_segmentation_gives_the_same_lesions_back(ct, tmp_path):
    source = headers(inspect(sorted((tmp_path / "ct").iterdir())))
    labels = drawn(ct.grid.shape, _1=BIG, _2=SMALL)
    liver = LabelVolume(drawn(ct.grid.shape, _1=np.s_[0:6, 1:11]), ct.grid)
    masks = Masks(liver, LabelVolume(labels, ct.grid), Provenance("drawn", "1"))
    criteria = Criteria(min_diameter_mm=5.0)
    first = measure(ct, masks, criteria)
    assert {lesion.disease for lesion in first.lesions} == set(Disease)
    (seg,) = dicom_seg.build(first, source, Identity(), datetime(2026, 1, 2, tzinfo=UTC), include_organ=True)
    assert seg is not None
    seg.save_as(tmp_path / "own.dcm")
    again = measure(ct, given(tmp_path / "own.dcm").segment(ct), criteria)
    assert np.array_equal(again.lesion_labels.labels, first.lesion_labels.labels)
    assert [(x.volume_mm3, x.long_axis, x.disease) for x in again.lesions] == [
        (x.volume_mm3, x.long_axis, x.disease) for x in first.lesions
    ]
    assert again.organ_volume_mm3 == first.organ_volume_mm3
    assert again.run_digest != first.run_digest  # corrected masks make results of their own


def change_seg(path: Path, change) -> Path:
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)
    return path


def shift(by_mm: float):
    def change(ds):
        for frame in ds.PerFrameFunctionalGroupsSequence:
            plane = frame.PlanePositionSequence[0]
            plane.ImagePositionPatient = [
                float(x) + by_mm * t for x, t in zip(plane.ImagePositionPatient, TURNED[:, 0], strict=True)
            ]

    return change


BAD_SEG = {
    "another frame of reference": (
        lambda ds: setattr(ds, "FrameOfReferenceUID", "2.25.9"),
        "is in frame of reference 2.25.9, the CT in 2.25.3",
    ),
    "between the slices": (shift(1.0), "lies between the CT's voxels"),
    "beyond the volume": (shift(25.0), "reaches outside the CT"),
    "fractional": (
        lambda ds: setattr(ds, "SegmentationType", "FRACTIONAL"),
        "a FRACTIONAL Segmentation; expected BINARY or LABELMAP",
    ),
    "not a segmentation": (
        lambda ds: setattr(ds, "SOPClassUID", "1.2.3"),
        "is DICOM of SOP class 1.2.3; expected a Segmentation",
    ),
    "no planes": (
        lambda ds: [delattr(f, "PlanePositionSequence") for f in ds.PerFrameFunctionalGroupsSequence],
        "cannot be read (transfer syntax 1.2.840.10008.1.2.1, StopIteration)",
    ),
    "segment 0 as a lesion": (
        lambda ds: setattr(ds.SegmentSequence[0], "SegmentNumber", 0),
        "segment 0 is not the background",
    ),
    "no pixels": (
        lambda ds: delattr(ds, "PixelData"),
        "cannot be read (transfer syntax 1.2.840.10008.1.2.1, AttributeError)",
    ),
}


@pytest.mark.parametrize("case", BAD_SEG)
def test_a_segmentation_that_does_not_fit_is_refused(case, ct, tmp_path):
    change, words = BAD_SEG[case]
    path = written_seg(tmp_path, [(ABNORMAL, LESION, drawn(ct.grid.shape, _1=BIG))])
    assert np.count_nonzero(given(path).segment(ct).lesions.labels) == 75
    assert words in refusal(ct, change_seg(path, change))


# The file and the options --------------------------------------------------------------------------------------------


def test_the_provenance_is_the_file_and_the_options(ct, tmp_path):
    path = nifti(tmp_path, drawn(ct.grid.shape, _2=BIG), ct.grid)
    provenance = given(path, lesion_labels=[2]).provenance
    assert provenance.weights_sha256 == {"masks": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (provenance.pipeline, provenance.notice) == ("given_masks", "")
    assert provenance.parameters == {"lesion_labels": [2]}
    assert given(path).provenance.digest != provenance.digest
    assert given(path).segment(ct).provenance == given(path).provenance


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"absent\.nii cannot be read: No such file"):
        given(tmp_path / "absent.nii")
    with pytest.raises(ConfigError, match="needs a masks_path"):
        pipelines.load("given_masks", PipelineSettings())


def test_a_file_that_changes_under_the_run_stops_it(ct, tmp_path):
    path = nifti(tmp_path, drawn(ct.grid.shape, _2=BIG), ct.grid)
    pipeline = given(path)
    nifti(tmp_path, drawn(ct.grid.shape, _2=SMALL), ct.grid)
    with pytest.raises(PipelineError, match="changed after this run began"):
        pipeline.segment(ct)


@pytest.mark.parametrize(
    "options",
    [
        {"lesions": [2]},
        {"lesion_labels": "2"},
        {"lesion_labels": [0]},
        {"organ_labels": [True]},
        {"lesion_per_label": "yes"},
        {"organ_labels": [1], "lesion_labels": [1]},
    ],
)
def test_options_that_mean_nothing_are_refused(options, tmp_path):
    path = nifti(tmp_path, np.zeros((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    with pytest.raises(ConfigError, match=r"organ_labels|lesion_labels|lesion_per_label"):
        given(path, **options)


# The public sets -----------------------------------------------------------------------------------------------------


def test_the_liver_of_set_02_given_as_one_lesion(testdata):
    folder = testdata / "02_liver_ct_seg_dcmqi" / "segmentations"
    ct = read_volume(inspect(files(folder / "ct-3slice")))
    masks = given(folder / "liver.dcm", lesion_labels=[1], lesion_per_label=True).segment(ct)
    [lesion] = measure(ct, masks, Criteria()).lesions
    assert lesion.volume_mm3 == pytest.approx(70_361.9, rel=1e-4)
    assert (lesion.mean_hu, lesion.sd_hu) == pytest.approx((37.329, 59.169), abs=5e-4)
    assert (lesion.min_hu, lesion.max_hu) == (-778, 221)
    as_liver = given(folder / "liver.dcm").segment(ct)
    assert as_liver.organ is not None
    assert as_liver.organ.labels.sum() == 107_098
    assert not as_liver.lesions.labels.any()


def test_segments_by_others_with_gaps_and_overlaps(testdata):
    folder = testdata / "02_liver_ct_seg_dcmqi" / "segmentations"
    ct = read_volume(inspect(files(folder / "24x38x3" / "image")))
    for name in ("sparse-labelmap-noppv.dcm", "sparse-labelmap-ppv5.dcm"):
        organ = given(folder / name).segment(ct).organ
        assert organ is not None
        assert organ.labels.sum(axis=(1, 2)).tolist() == [315, 0, 315]  # the frame between was left out
    ct = read_volume(inspect(files(folder / "ct-3slice")))
    masks = given(folder / "partial_overlaps.dcm", lesion_labels=[5], organ_labels=[2]).segment(ct)
    assert masks.lesions.labels.any()


@pytest.mark.parametrize("name", ["liver_expb", "liver_j2k", "liver_nonbyte_aligned", "liver_nonbyte_aligned_j2k"])
def test_segmentations_in_other_encodings_hold_the_same_liver(name, testdata):
    ct = read_volume(inspect(files(testdata / "02_liver_ct_seg_dcmqi" / "segmentations" / "ct-3slice")))
    organ = given(testdata / "08_odd_ct_and_seg_encodings" / f"{name}.dcm").segment(ct).organ
    assert organ is not None
    assert organ.labels.sum() == 107_098


def test_an_encoding_that_cannot_be_decoded_is_named(testdata):
    ct = read_volume(inspect(files(testdata / "02_liver_ct_seg_dcmqi" / "segmentations" / "ct-3slice")))
    words = refusal(ct, testdata / "08_odd_ct_and_seg_encodings" / "liver_deflate.dcm")
    assert "cannot be read (transfer syntax 1.2.840.10008.1.2.8.1" in words


def test_the_reference_liver_of_set_01_with_two_lesions_drawn_inside(testdata, tmp_path):
    folder = testdata / "01_abdomen_ct_siemens_j2k"
    ct = read_volume(inspect(given_uids(files(folder / "example_ct_dicom"), tmp_path)))
    reference = read_labels(folder / "example_seg_dicom.nii.gz")
    liver = given(folder / "example_seg_dicom.nii.gz", organ_labels=[5]).segment(ct).organ
    assert liver is not None
    assert np.array_equal(
        liver.labels, reference.labels[:, ::-1] == 5
    )  # y flipped; x and z direct, slices from the feet
    assert liver.labels.sum() == 366_708
    assert liver.labels.sum() * ct.grid.voxel_volume_mm3 == pytest.approx(699_400, rel=1e-4)
    assert ct.voxels_hu[liver.labels == 1].mean() == pytest.approx(89.3, abs=0.05)

    edited = reference.labels.copy()
    centre = [int(x) for x in np.argwhere(edited == 5).mean(axis=0)]
    slices, rows, columns = np.indices(edited.shape)
    for value, radius, column in ((40, 8, centre[2] - 15), (41, 4, centre[2] + 5)):
        ball = (2.0 * (slices - centre[0])) ** 2 + 0.95 * (rows - centre[1]) ** 2 + 0.95 * (
            columns - column
        ) ** 2 <= radius**2
        assert (reference.labels[ball] == 5).all()
        edited[ball] = value
    path = nifti(tmp_path, edited, reference.grid)
    findings = measure(ct, given(path, organ_labels=[5], lesion_labels=[40, 41]).segment(ct), Criteria())
    assert findings.organ_volume_mm3 == pytest.approx(699_400, rel=1e-4)
    assert [lesion.disease for lesion in findings.lesions] == [Disease.MEASURABLE, Disease.NON_MEASURABLE]
    on_ct = onto(LabelVolume(edited, reference.grid), ct.grid).labels
    assert [lesion.voxels for lesion in findings.lesions] == [(on_ct == 40).sum(), (on_ct == 41).sum()]
    assert ct.slice_sop_uids[findings.lesions[0].slice_index] == findings.lesions[0].slice_sop_uid

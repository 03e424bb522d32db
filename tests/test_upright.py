"""Tilted and unevenly spaced slices: upright for the network, and every result back on the slices themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from made_series import AXIAL, ORIENTATIONS, edit, files, made
from scipy import ndimage

from salsa_node import batch, cases, nifti, scripting
from salsa_node.analysis import Analysis, Lineage, Outcome, Terms, analyse, check
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Kind
from salsa_node.errors import SeriesRejected
from salsa_node.limits import Limits
from salsa_node.pipelines import Masks, Observer, Provenance, unobserved
from salsa_node.series import inspect, read_volume
from salsa_node.series_rules import SeriesRules
from salsa_node.upright import put_back, upright
from salsa_node.volume import CtVolume, Grid, LabelVolume

RESAMPLE = SeriesRules(tilt="resample", irregular="resample")
EVEN = tuple(2.5 * n for n in range(12))
UNEVEN = (0.0, 2.5, 5.0, 7.5, 8.6, 12.0, 16.0, 20.0, 22.5, 25.0, 27.5, 30.0)  # mm along the normal
BALL_MM = 9.0


def lying(folder: Path, places_mm: tuple[float, ...], degrees: float, axes: np.ndarray = AXIAL) -> list[Path]:
    """A CT on disk whose slices lie at those places and whose gantry is tilted; numbers rise evenly through space."""
    shape = (60, 50)
    ct, paths = made(folder, axes, slices=len(places_mm))
    affine = ct.grid.affine_lps_mm
    for path, mm in zip(paths, places_mm, strict=True):
        corner = affine[:3, 3] + axes[:, 0] * mm + axes[:, 1] * mm * np.tan(np.radians(degrees))

        def put(ds: pydicom.Dataset, corner: np.ndarray = corner) -> None:
            ds.Rows, ds.Columns = shape
            rows, columns = np.meshgrid(*map(np.arange, shape), indexing="ij")
            points = corner + rows[..., None] * affine[:3, 1] + columns[..., None] * affine[:3, 2]
            ds.PixelData = np.rint(density(points)).astype(np.int16).tobytes()
            ds.ImagePositionPatient = [round(float(x), 6) for x in corner]

        edit(path, put)
    return paths


def density(points_lps_mm: np.ndarray) -> np.ndarray:
    return points_lps_mm @ np.array([3.0, -4.0, 5.0]) - 4200


def points(grid: Grid) -> np.ndarray:
    """(slices, rows, columns, 3): the place of every voxel, one by one by the grid's own word."""
    return (
        np.array([[grid.to_lps_mm((k, r, 0)) for r in range(grid.shape[1])] for k in range(grid.shape[0])])[
            :, :, None, :
        ]
        + np.arange(grid.shape[2])[:, None] * grid.affine_lps_mm[:3, 2]
    )


CASES = {"tilted": (EVEN, 14.0), "tilted back": (EVEN, -20.0), "uneven": (UNEVEN, 0.0), "both": (UNEVEN, 18.5)}


@pytest.mark.parametrize("axes", [ORIENTATIONS["axial"], ORIENTATIONS["oblique"]], ids=["axial", "oblique"])
@pytest.mark.parametrize("case", CASES)
def test_the_grid_of_the_slices_puts_every_voxel_where_its_image_says(case, axes, tmp_path):
    series = inspect(lying(tmp_path, *CASES[case], axes), RESAMPLE)
    ct = read_volume(series)
    assert not ct.grid.is_upright
    assert np.abs(density(points(ct.grid)) - ct.voxels_hu).max() <= 0.51
    for index in [(0, 0, 0), (4, 10, 20), (11, 59, 49), (3.4, 2.2, 1.1)]:
        assert ct.grid.to_index(ct.grid.to_lps_mm(index)) == pytest.approx(index, abs=1e-6)


@pytest.mark.parametrize("axes", [ORIENTATIONS["axial"], ORIENTATIONS["oblique"]], ids=["axial", "oblique"])
@pytest.mark.parametrize("case", CASES)
def test_upright_holds_the_same_numbers_at_the_same_places(case, axes, tmp_path):
    ct = read_volume(inspect(lying(tmp_path, *CASES[case], axes), RESAMPLE))
    made_upright = upright(ct)
    assert made_upright.grid.is_upright
    assert made_upright.grid.spacing_mm == pytest.approx((2.5, 0.7, 0.9))
    sample = points(made_upright.grid)[:, ::3, ::3]
    places = np.array([ct.grid.to_index(p) for p in sample.reshape(-1, 3)]).reshape(sample.shape)
    rim = np.array([-1e-3, 2.5, 1.5])  # where one neighbour lies beside the other, air mixes in
    inside = ((places >= rim) & (places <= np.array(ct.grid.shape) - 1 - rim)).all(axis=-1)
    assert inside.sum() > 0.7 * ct.voxels_hu.size / 9
    apart = np.abs(density(sample) - made_upright.voxels_hu[:, ::3, ::3])
    assert apart[inside].max() <= 1.1  # two roundings
    outside = ((places < -3) | (places > np.array(ct.grid.shape) + 2)).any(axis=-1)
    assert (made_upright.voxels_hu[:, ::3, ::3][outside] == -1024).all()


def test_upright_is_what_simpleitk_makes_of_a_tilted_stack(tmp_path):
    paths = lying(tmp_path, EVEN, 14.0)
    noise = np.random.default_rng(2)
    for path in paths:
        edit(path, lambda ds: setattr(ds, "PixelData", noise.integers(-900, 900, 3000).astype(np.int16).tobytes()))
    ct = read_volume(inspect(paths, RESAMPLE))
    ours = upright(ct)
    image = SimpleITK.GetImageFromArray(ct.voxels_hu)
    image.SetSpacing((0.9, 0.7, 2.5))
    shear = SimpleITK.AffineTransform(3)
    shear.SetMatrix((1, 0, 0, 0, 1, -np.tan(np.radians(14.0)), 0, 0, 1))
    size = [int(n) for n in reversed(ours.grid.shape)]
    low = (ours.grid.affine_lps_mm[:3, 3] - ct.grid.affine_lps_mm[:3, 3]).tolist()
    theirs = SimpleITK.Resample(
        image, size, shear, SimpleITK.sitkLinear, low, (0.9, 0.7, 2.5), (1, 0, 0, 0, 1, 0, 0, 0, 1), -1024.0
    )
    theirs_hu = SimpleITK.GetArrayFromImage(theirs)
    both = (theirs_hu != -1024) & (ours.voxels_hu != -1024)
    assert both.sum() > 0.9 * ct.voxels_hu.size
    edge = np.abs(theirs_hu[both].astype(int) - ours.voxels_hu[both]) > 1
    assert edge.mean() < 0.04  # at the rim of a slice theirs knows no air beside it


@pytest.mark.parametrize(
    ("per_step", "offsets"),
    [
        ((0.37, 0.0), None),  # a gantry's tilt: rows alone
        ((-0.61, 0.0), None),
        ((0.0, 0.83), None),
        ((-1.3, 2.21), None),
        ((2.0, 0.0), (0.0, 1.0, 1.4, 3.3, 4.3, 6.1)),
        ((-0.47, 1e-9), (0.0, 1.2, 2.0, 3.0, 4.0, 5.7)),
    ],
)
def test_a_slice_is_shifted_as_scipy_shifts_it(per_step, offsets):
    voxels = np.random.default_rng(5).uniform(-900, 900, (6, 11, 13)).astype(np.float32)
    affine = np.diag([2.0, 0.8, 0.8, 1.0])
    affine[1:3, 0] = 0.8 * np.array(per_step)
    found = upright(CtVolume(voxels, Grid(voxels.shape, affine, None, offsets)))
    along = np.arange(6.0) if offsets is None else np.array(offsets)
    aside = np.outer(along, per_step)
    aside[np.abs(aside) < 1e-6] = 0
    low = np.floor(aside.min(axis=0))
    planes = np.full((6, *found.grid.shape[1:]), -1024.0)
    planes[:, :11, :13] = voxels
    for k, by in enumerate(aside - low):
        planes[k] = ndimage.shift(np.roll(planes[k], by.astype(int), (0, 1)), by % 1, order=1, cval=-1024.0)
    step = float(np.median(np.diff(along)))
    for j, plane in enumerate(found.voxels_hu):
        at = np.interp(j * step, along, np.arange(6))
        k = min(int(at), 4)
        expected = planes[k] * (k + 1 - at) + planes[k + 1] * (at - k)
        np.testing.assert_allclose(plane, expected, atol=1e-3)


def test_masks_come_back_exactly_where_the_shear_is_whole_pixels(tmp_path):
    degrees = float(np.degrees(np.arctan(2 * 0.7 / 2.5)))  # two rows a slice
    ct = read_volume(inspect(lying(tmp_path, EVEN, degrees), RESAMPLE))
    up = upright(ct)
    assert up.grid.shape == (12, 60 + 22, 50)
    numbered = LabelVolume(np.arange(up.voxels_hu.size, dtype=np.uint32).reshape(up.grid.shape), up.grid)
    back = put_back(Masks(None, numbered, Provenance("x", "1")), ct.grid)
    for k in range(12):
        assert np.array_equal(back.lesions.labels[k], numbered.labels[k, 2 * k : 2 * k + 60])
        assert np.array_equal(ct.voxels_hu[k], up.voxels_hu[k, 2 * k : 2 * k + 60])
    assert back.lesions.grid is ct.grid
    assert back.provenance.digest != Provenance("x", "1").digest
    assert "sheared by 29.2 degrees" in str(back.provenance.parameters)


def test_uneven_slices_weigh_as_much_as_they_are_thick():
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    grid = Grid((4, 5, 5), affine, None, (0.0, 1.0, 1.5, 3.0))
    assert grid.volume_mm3(np.array([1, 0, 0, 0])) == pytest.approx(2.0)  # reaches as far out as in
    assert grid.volume_mm3(np.array([0, 10, 0, 0])) == pytest.approx(10 * (2.0 + 1.0) / 2)
    assert grid.volume_mm3(np.array([4, 3]), first_slice=2) == pytest.approx(4 * (1.0 + 3.0) / 2 + 3 * 3.0)
    with pytest.raises(ValueError, match="must rise from 0"):
        Grid((4, 5, 5), affine, None, (0.0, 1.0, 1.0, 3.0))
    assert not grid.matches(Grid((4, 5, 5), affine))
    assert grid.matches(Grid((4, 5, 5), affine, None, (0.0, 1.0, 1.5, 3.0)))


class Ball:
    """A pipeline that sees one ball, wherever the upright images put it."""

    provenance = Provenance("ball", "1")

    def __init__(self, centre_lps_mm: tuple[float, float, float]) -> None:
        self.centre = np.array(centre_lps_mm)

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        assert ct.grid.is_upright
        ball = np.linalg.norm(points(ct.grid) - self.centre, axis=-1) <= BALL_MM
        return Masks(None, LabelVolume(ball.astype(np.uint8), ct.grid), self.provenance)

    def unload(self) -> None: ...


def analysed(paths: list[Path], rules: SeriesRules) -> Analysis:
    middle = pydicom.dcmread(paths[6])
    x, y, z = (float(n) for n in middle.ImagePositionPatient)
    pipeline = Ball((x + 25 * 0.9, y + 30 * 0.7, z))
    born = Lineage(datetime(2026, 1, 2, tzinfo=UTC))
    return analyse(paths, pipeline, Terms(series=rules), lambda _: born)


@pytest.mark.parametrize("case", CASES)
def test_results_lie_on_the_slices_as_they_were_acquired(case, tmp_path):
    paths = lying(tmp_path, *CASES[case])
    assert analysed(paths, SeriesRules()).outcome is Outcome.NOT_ANALYSED
    result = analysed(paths, RESAMPLE)
    assert result.outcome is Outcome.LESIONS
    assert not result.blocked
    check([written(made.ds) for made in result.objects], paths, result)
    [lesion] = result.findings.lesions
    assert lesion.volume_mm3 == pytest.approx(4 / 3 * np.pi * BALL_MM**3, rel=0.06)
    assert lesion.long_axis.length_mm == pytest.approx(2 * BALL_MM, abs=1.6)
    middle = pydicom.dcmread(paths[6]).ImagePositionPatient
    centre = (float(middle[0]) + 22.5, float(middle[1]) + 21.0, float(middle[2]))
    assert lesion.centroid_lps_mm == pytest.approx(centre, abs=0.6)
    [seg, *_] = result.of(Kind.SEG)
    own = {str(ds.SOPInstanceUID): ds for ds in map(pydicom.dcmread, paths)}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = own[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert list(frame.PlanePositionSequence[0].ImagePositionPatient) == list(source.ImagePositionPatient)
    assert {flag.name for flag in result.findings.flags} >= {"resampled"}
    [report] = result.of(Kind.SR)
    assert "resampled before the analysis" in "".join(
        str(e.value) for e in report.iterall() if e.keyword == "TextValue"
    )


def test_slices_too_far_apart_are_never_resampled(tmp_path):
    paths = lying(tmp_path, UNEVEN, 0.0)
    rules = SeriesRules("resample", "resample", max_gap_mm=3.0)
    words = r"steps from 1.10 to 4.00 mm, median 2.50 mm; expected one spacing; at most 3 mm may be resampled"
    with pytest.raises(SeriesRejected, match=words):
        inspect(paths, rules)


def test_slices_beside_one_line_are_no_tilt(tmp_path):
    paths = lying(tmp_path, EVEN, 14.0)
    edit(paths[5], lambda ds: setattr(ds, "ImagePositionPatient", [float(x) + 1 for x in ds.ImagePositionPatient]))
    with pytest.raises(SeriesRejected, match="slices lie up to 1"):
        inspect(paths, RESAMPLE)


def test_a_position_taken_twice_stays_refused(tmp_path):
    paths = lying(tmp_path, (*EVEN[:5], EVEN[4], *EVEN[6:]), 0.0)
    with pytest.raises(SeriesRejected, match="1 of 12 slices lie where another one lies"):
        inspect(paths, RESAMPLE)


@pytest.mark.parametrize(
    ("folder", "degrees", "spacing_mm"),
    [
        ("04_ge_tilt_variable_spacing", 18.5, 4.0),
        ("06_ct_bad_geometry/gantrytilting/001", 14.0, 4.8),
        ("06_ct_bad_geometry/sliceincrement/001", 0.0, 5.0),
        ("06_ct_bad_geometry/sliceincrement/002", 15.5, 0.7),
    ],
)
def test_public_series_are_resampled_where_the_rules_say_so(folder, degrees, spacing_mm, testdata):
    paths = files(testdata / folder)
    ct = read_volume(inspect(paths, RESAMPLE))
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        k = ct.slice_sop_uids.index(ds.SOPInstanceUID)
        assert ct.grid.to_lps_mm((k, 0, 0)) == pytest.approx([float(x) for x in ds.ImagePositionPatient], abs=0.06)
    up = upright(ct)
    assert up.grid.spacing_mm[0] == pytest.approx(spacing_mm, abs=0.1)
    nothing = LabelVolume(np.zeros(up.grid.shape, np.uint8), up.grid)
    [flag] = put_back(Masks(None, nothing, Provenance("x", "1")), ct.grid).flags
    assert (f"sheared by {degrees:.1f} degrees" in flag.text) == (degrees > 0)
    of_tissue = [hu[(hu > 0) & (hu < 100)].size / hu[hu > -900].size for hu in (ct.voxels_hu, up.voxels_hu)]
    assert of_tissue[1] == pytest.approx(of_tissue[0], rel=0.2)


def written(ds: pydicom.Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def overlap_with_ball(path: Path, centre: np.ndarray) -> float:
    """The Dice of a written label map against the ball, by the file's own word of where its voxels lie."""
    labels = nifti.read_labels(path)
    ball = np.linalg.norm(points(labels.grid) - centre, axis=-1) <= BALL_MM
    return 2 * float((ball & (labels.labels > 0)).sum()) / float(ball.sum() + (labels.labels > 0).sum())


@pytest.mark.parametrize("case", CASES)
def test_a_batch_resamples_by_the_same_rules_and_its_label_map_lies_on_the_voxels_that_export_writes(case, tmp_path):
    paths = lying(tmp_path / "scan", *CASES[case])
    middle = [float(x) for x in pydicom.dcmread(paths[6]).ImagePositionPatient]
    centre = np.array([middle[0] + 22.5, middle[1] + 21.0, middle[2]])

    def told(rules: cases.Rules) -> batch.Result:
        placed = cases.placed(cases.find([str(tmp_path / "scan")], rules), tmp_path / "out")
        [result] = batch.run(placed, Ball(tuple(centre)), Criteria(), Limits(), batch.Wanted(), rules.series)
        return result

    assert "no series of this study can be analysed" in told(cases.Rules()).told
    result = told(cases.Rules(series=RESAMPLE))
    assert (result.state, len(result.lesions)) == ("done", 1), result.told
    assert nifti.read_labels(result.place).grid.matches(upright(read_volume(inspect(paths, RESAMPLE))).grid)
    assert overlap_with_ball(result.place, centre) > 0.9


def test_nifti_is_never_written_of_slices_that_it_cannot_hold(tmp_path):
    for name, case in CASES.items():
        ct = read_volume(inspect(lying(tmp_path / name, *case), RESAMPLE))
        with pytest.raises(ValueError, match="put the volume on an upright grid first"):
            nifti.write_ct(ct, tmp_path / "scan.nii")


def test_scripts_read_by_the_rules_of_the_config(tmp_path, monkeypatch):
    lying(tmp_path / "scan", *CASES["tilted"])
    monkeypatch.delenv("SALSA_NODE_CONFIG", raising=False)
    with pytest.raises(SeriesRejected, match="gantry tilt"):
        scripting.read(tmp_path / "scan")
    (tmp_path / "own.toml").write_text('[series]\ntilt = "resample"\n[selection]\nmax_tilt_degrees = 30\n')
    monkeypatch.setenv("SALSA_NODE_CONFIG", str(tmp_path / "own.toml"))
    scan = scripting.read(tmp_path / "scan")
    assert not scan.ct.grid.is_upright
    x, y, z = scan.ct.grid.to_lps_mm((6, 30, 25))
    findings = scripting.find(scan, Ball((x, y, z)))
    scripting.write_labels(findings, scan, tmp_path / "lesions.nii.gz")
    assert overlap_with_ball(tmp_path / "lesions.nii.gz", np.array([x, y, z])) > 0.9

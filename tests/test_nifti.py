"""NIfTI files become volumes that lie right, or are refused with the reason."""

from __future__ import annotations

import contextlib
import gzip
import random
import warnings
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest

from salsa_node.errors import SeriesRejected
from salsa_node.nifti import LABEL_MAP, read_ct, read_description, read_labels, write_ct, write_labels
from salsa_node.volume import CtVolume, Grid, LabelVolume

RAS = np.diag([0.8, 0.9, 2.5, 1.0])
RAS[:3, 3] = (-100.0, -50.0, 900.0)


def saved(path, data, affine=RAS, code=1, unit="mm"):
    image = nib.nifti1.Nifti1Image(data, affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def placed(path, row):
    """A file whose second sform row, which nibabel would not write, is put into its bytes."""
    data = bytearray(saved(path, hu()).read_bytes())
    data[296:312] = np.array(row, "<f4").tobytes()
    path.write_bytes(data)
    return path


def hu(shape=(4, 5, 6)):
    return np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16)


def test_x_y_z_becomes_slice_row_column_and_ras_becomes_lps(tmp_path):
    data = hu()
    ct = read_ct(saved(tmp_path / "ct.nii.gz", data))
    assert ct.grid.shape == (6, 5, 4)
    assert ct.voxels_hu.dtype == np.int16
    assert ct.voxels_hu[5, 4, 3] == data[3, 4, 5]
    assert ct.grid.to_lps_mm((0, 0, 0)) == pytest.approx((100.0, 50.0, 900.0))
    assert ct.grid.to_lps_mm((5, 4, 3)) == pytest.approx((100.0 - 2.4, 50.0 - 3.6, 912.5))
    assert ct.slice_sop_uids == ()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_slice_axis_is_the_one_along_the_patient_whatever_the_storage(order, tmp_path):
    data = hu()
    affine = RAS[:, [*order, 3]]
    ct = read_ct(saved(tmp_path / "ct.nii", data.transpose(order), affine))
    assert ct.grid.spacing_mm[0] == pytest.approx(2.5)
    index = tuple(round(x) for x in ct.grid.to_index((100.0 - 2.4, 50.0 - 0.9, 902.5)))
    assert ct.voxels_hu[index] == data[3, 1, 1]


def test_fractions_and_scaled_values_survive(tmp_path):
    data = hu().astype(np.float32) + np.float32(0.25)
    assert np.array_equal(read_ct(saved(tmp_path / "a.nii", data)).voxels_hu, data.transpose(2, 1, 0))
    image = nib.nifti1.Nifti1Image(np.arange(120, dtype=np.uint16).reshape(4, 5, 6), RAS)
    image.header.set_slope_inter(2, -1024)
    image.set_sform(RAS, code=1)
    nib.save(image, tmp_path / "b.nii")
    ct = read_ct(tmp_path / "b.nii")
    stored = nib.load(tmp_path / "b.nii")
    assert ct.voxels_hu.min() < 0
    assert np.array_equal(ct.voxels_hu, stored.get_fdata().transpose(2, 1, 0))


def test_a_fourth_dimension_of_one_is_none(tmp_path):
    assert read_ct(saved(tmp_path / "ct.nii", hu()[..., None])).grid.shape == (6, 5, 4)


BAD_CT = {
    "four dimensions": (lambda p: saved(p, hu((4, 5, 6, 2))), "shape (4, 5, 6, 2); expected three dimensions"),
    "two dimensions": (lambda p: saved(p, hu((4, 5))), "expected three dimensions"),
    "not a number": (
        lambda p: saved(p, np.where(hu() > 1400, np.nan, hu()).astype(np.float32)),
        "voxels are not finite",
    ),
    "windowed to a byte": (lambda p: saved(p, (hu() % 256).astype(np.uint8)), "no Hounsfield units"),
    "complex": (lambda p: saved(p, hu().astype(np.complex64)), "expected one real number each"),
    "no place": (lambda p: saved(p, hu(), code=0), "does not say where it lies"),
    "metres": (lambda p: saved(p, hu(), unit="meter"), "lengths in meter; expected mm"),
    "flat": (lambda p: placed(p, [0, 0, 0, 1]), "does not span space"),
    "infinite": (lambda p: placed(p, [0, np.inf, 0, 1]), "the affine is not finite"),
}


@pytest.mark.parametrize("case", BAD_CT)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, over the NaN we hand in
def test_what_is_no_ct_is_refused(case, tmp_path):
    make, words = BAD_CT[case]
    with pytest.raises(SeriesRejected) as caught:
        read_ct(make(tmp_path / "Nobody.nii"))
    assert words in caught.value.reason
    assert "Nobody" not in caught.value.reason


def test_broken_files_are_refused_without_their_names(tmp_path):
    whole = saved(tmp_path / "Nobody.nii.gz", hu((40, 50, 60))).read_bytes()
    (tmp_path / "Nobody cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "Nobody plain cut.nii").write_bytes(gzip.decompress(whole)[:1000])
    (tmp_path / "Nobody text.nii").write_text("liver " * 100)
    (tmp_path / "Nobody empty.nii").touch()
    nib.save(nib.freesurfer.mghformat.MGHImage(hu(), RAS), tmp_path / "Nobody.mgz")
    names = [p for p in tmp_path.iterdir() if p.name != "Nobody.nii.gz"] + [tmp_path / "Nobody absent.nii"]
    assert len(names) == 6
    for path in names:
        with pytest.raises(SeriesRejected) as caught:
            read_ct(path)
        assert "Nobody" not in caught.value.reason
        assert "NIfTI" in caught.value.reason


def test_a_damaged_header_ends_in_a_verdict_and_nothing_else(tmp_path):
    path = saved(tmp_path / "ct.nii", hu())
    whole, chance, read = path.read_bytes(), random.Random(1), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 5])):
            damaged[chance.randrange(352)] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(SeriesRejected), warnings.catch_warnings(action="ignore"):
            read_ct(path)
            read += 1
    assert 15 < read < 135  # some bytes matter, some do not


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.int64])
def test_labels_of_any_number_type_are_the_integers_they_are(dtype, tmp_path):
    data = np.random.default_rng(1).integers(0, 9, (4, 5, 6)).astype(dtype)
    image = nib.nifti1.Nifti1Image(data, RAS, dtype=dtype)
    image.set_sform(RAS, code=1)
    nib.save(image, tmp_path / "l.nii.gz")
    labels = read_labels(tmp_path / "l.nii.gz")
    assert labels.labels.dtype == np.uint8
    assert np.array_equal(labels.labels, data.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("value", "words"), [(-1, "from -1 to"), (0.5, "no label map"), (70000, "70000 are no label map")]
)
def test_what_is_no_label_map_is_refused(value, words, tmp_path):
    data = np.zeros((4, 5, 6), np.float32)
    data[1, 1, 1] = value
    with pytest.raises(SeriesRejected, match=words):
        read_labels(saved(tmp_path / "l.nii", data))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_written_labels_come_back_and_lie_where_itk_puts_them(suffix, tmp_path):
    import SimpleITK

    axes = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))[0][:, [2, 1, 0]]
    axes = axes[:, np.argsort(-np.abs(axes[2]))]  # the slice axis nearest to the patient's z
    affine = np.eye(4)
    affine[:3, :3] = axes * (2.5, 0.7, 0.9)
    affine[:3, 3] = (12.0, -34.0, 56.0)
    labels = LabelVolume(
        np.random.default_rng(1).integers(0, 300, (4, 5, 6)).astype(np.uint16), Grid((4, 5, 6), affine)
    )
    path = tmp_path / f"labels{suffix}"
    write_labels(labels, path)
    again = read_labels(path)
    assert again.grid.matches(labels.grid)
    assert np.array_equal(again.labels, labels.labels)
    image = SimpleITK.ReadImage(str(path))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), labels.labels)
    assert image.TransformIndexToPhysicalPoint((5, 4, 3)) == pytest.approx(labels.grid.to_lps_mm((3, 4, 5)), abs=1e-3)


def test_a_description_comes_back_and_outlives_another_programs_copy(tmp_path):
    import SimpleITK

    labels = LabelVolume(np.zeros((4, 5, 6), np.uint8), Grid((4, 5, 6), np.diag([2.5, 0.7, 0.9, 1.0])))
    path, copy = tmp_path / "labels.nii.gz", tmp_path / "copy.nii.gz"
    write_labels(labels, path)
    assert read_description(path) == ""
    write_labels(labels, path, LABEL_MAP)
    assert read_description(path) == LABEL_MAP
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(copy))
    assert read_description(copy) == LABEL_MAP
    write_labels(labels, path, "x" * 79)
    assert read_description(path) == "x" * 79
    for odd in ("x" * 80, "läsion"):
        with pytest.raises(ValueError, match="at most 79 ASCII characters"):
            write_labels(labels, path, odd)


def test_what_is_no_nifti_has_no_description(tmp_path):
    (tmp_path / "Nobody.nii").write_text("liver " * 100)
    nib.save(nib.freesurfer.mghformat.MGHImage(hu(), RAS), tmp_path / "Nobody.mgz")
    for path in (*tmp_path.iterdir(), tmp_path / "Nobody absent.nii"):
        with pytest.raises(SeriesRejected, match="NIfTI") as caught:
            read_description(path)
        assert "Nobody" not in caught.value.reason


def test_the_public_ct_and_labels_share_a_grid(testdata):
    folder = testdata / "01_abdomen_ct_siemens_j2k"
    ct, labels = read_ct(folder / "example_ct_sm.nii.gz"), read_labels(folder / "example_seg.nii.gz")
    assert ct.grid.shape == (30, 101, 122)
    assert ct.grid.matches(labels.grid)
    assert 40 < ct.voxels_hu[labels.labels == 5].mean() < 150  # the liver
    assert ct.voxels_hu.min() == -1100


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("oblique", [False, True])
def test_a_map_like_its_scan_lies_voxel_on_voxel_with_it(order, oblique, tmp_path):
    affine = RAS.copy()
    if oblique:
        turned = np.deg2rad(20)
        affine[:3, :3] = [
            [np.cos(turned), -np.sin(turned), 0],
            [np.sin(turned), np.cos(turned), 0],
            [0, 0, 1],
        ] @ affine[:3, :3]
    affine = affine[:, [*order, 3]]
    data = hu().transpose(order)
    source = saved(tmp_path / "scan.nii.gz", data, affine)
    ct = read_ct(source)
    write_labels(LabelVolume((ct.voxels_hu > 0).astype(np.uint8), ct.grid), tmp_path / "map.nii.gz", like=source)
    scan, written = nib.load(source), nib.load(tmp_path / "map.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), (data > 0).astype(np.uint8))
    assert np.array_equal(written.affine, scan.affine)
    for of in ("qform_code", "sform_code"):
        assert written.header[of] == scan.header[of]


def test_a_map_of_another_scan_is_not_written_like_this_one(tmp_path):
    source = saved(tmp_path / "scan.nii.gz", hu())
    labels = LabelVolume(np.zeros((6, 5, 4), np.uint8), Grid((6, 5, 4), np.eye(4)[:, [2, 1, 0, 3]]))
    with pytest.raises(SeriesRejected, match="do not lie on the grid of the scan"):
        write_labels(labels, tmp_path / "map.nii.gz", like=source)


def test_written_ct_numbers_come_back(tmp_path):
    ct = read_ct(saved(tmp_path / "scan.nii.gz", hu()))
    for voxels in (ct.voxels_hu, ct.voxels_hu.astype(np.float32) + np.float32(0.5)):
        write_ct(CtVolume(voxels, ct.grid), tmp_path / "again.nii.gz")
        again = read_ct(tmp_path / "again.nii.gz")
        assert again.grid.matches(ct.grid)
        assert np.array_equal(again.voxels_hu, voxels)
        assert again.voxels_hu.dtype == voxels.dtype


def test_a_sheared_scan_is_refused(tmp_path):
    affine = RAS.copy()
    affine[1, 2] = 0.2
    image = nib.nifti1.Nifti1Image(hu(), affine)
    image.set_sform(affine, code=1)
    nib.save(image, tmp_path / "scan.nii")
    with pytest.raises(SeriesRejected, match=r"4\.6 degrees off the perpendicular"):
        read_ct(tmp_path / "scan.nii")


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(SeriesRejected, match="there is no such file"):
        read_ct(tmp_path / "scan.nii.gz")


def test_a_file_that_this_user_may_not_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = saved(tmp_path / "ct.nii.gz", hu())
    monkeypatch.setattr("salsa_node.nifti.os.access", lambda path, mode: False)
    with pytest.raises(SeriesRejected, match="this user may not read the file"):
        read_ct(path)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint16])
def test_a_scan_that_lost_its_intercept_is_refused(tmp_path, dtype):
    shifted = (np.clip(hu(), -1024, None) + 1024).astype(dtype)
    with pytest.raises(SeriesRejected, match=r"values from .* no Hounsfield units, which reach below zero"):
        read_ct(saved(tmp_path / "shifted.nii.gz", shifted))

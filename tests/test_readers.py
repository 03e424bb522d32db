"""Software that we did not write reads our results, and gets our numbers back.

dcmqi is what 3D Slicer reads SEG and TID 1500 with; dcmjs is what OHIF reads them with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import made_findings as made
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset
from test_dicom_seg import expected_map

from salsa_node import codes, dicom_seg, dicom_sr
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity
from salsa_node.findings import Findings, measure
from salsa_node.pipelines import PipelineSettings
from salsa_node.pipelines.given_masks import GivenMasksPipeline
from salsa_node.series import headers, inspect, read_volume
from salsa_node.volume import Grid

IDENTITY = Identity()
PEERS = Path(os.environ.get("SALSA_NODE_PEERS", Path(__file__).parents[1] / ".peers"))


def dcmqi(program: str, *arguments: object) -> None:
    """Run one of dcmqi's programs, which pip puts beside this Python."""
    path = Path(sys.executable).parent / program
    if not path.exists():
        pytest.skip(f"{program} is not installed (pip install dcmqi)")
    done = subprocess.run([str(path), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def objects(findings: Findings, source: list[Dataset], folder: Path) -> tuple[Path, Path, Path]:
    """The SEG by class, the SEG by lesion and the record, as files."""
    (by_class,) = dicom_seg.build(findings, source, IDENTITY, made.PRODUCED_AT)
    (alone,) = dicom_seg.build_lesions(findings, source, IDENTITY, made.PRODUCED_AT)
    report = dicom_sr.build(findings, [by_class, alone], source, IDENTITY, made.PRODUCED_AT)
    paths = []
    for name, ds in (("seg", by_class), ("lesion_seg", alone), ("sr", report)):
        paths.append(folder / f"{name}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths[0], paths[1], paths[2]


def onto(images: list[Path], grid: Grid) -> np.ndarray:
    """ITK images of segments -> one label map on `grid`, each voxel by its position; n + 1 for the n-th file."""
    out = np.zeros(grid.shape, dtype=int)
    for number, path in enumerate(images, start=1):
        image = SimpleITK.ReadImage(str(path))
        voxels = np.argwhere(SimpleITK.GetArrayFromImage(image) != 0)[:, ::-1]
        step = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        points = np.array(image.GetOrigin()) + voxels @ step.T
        index = np.linalg.solve(grid.affine_lps_mm, np.c_[points, np.ones(len(points))].T)[:3]
        assert np.abs(index - np.rint(index)).max() < 0.02
        out[tuple(np.rint(index).astype(int))] = number
    return out


@pytest.mark.parametrize("orientation", made.ORIENTATIONS)
def test_dcmqi_reads_the_label_map_voxel_for_voxel(orientation, tmp_path):
    findings, source = made.case(orientation)
    _, alone, _ = objects(findings, source, tmp_path)
    dcmqi("segimage2itkimage", "--inputDICOM", alone, "--outputDirectory", tmp_path, "-t", "nrrd", "-p", "s")
    images = sorted(tmp_path.glob("s-*.nrrd"), key=lambda path: int(path.stem.split("-")[1]))
    assert len(images) == len(findings.lesions)
    np.testing.assert_array_equal(onto(images, findings.lesion_labels.grid), findings.lesion_labels.labels)


def test_dcmqi_reads_the_classes_voxel_for_voxel_and_by_name(tmp_path):
    where = made.grid("oblique")
    source = made.headers(where, instance_numbers="falling")
    second = np.s_[5:9, 30:42, 20:34]  # measurable too: a class of two lesions
    findings = made.findings(where, source, made.MEASURABLE_BOX, made.SMALL_BOX, second)
    by_class, _, _ = objects(findings, source, tmp_path)
    dcmqi("segimage2itkimage", "--inputDICOM", by_class, "--outputDirectory", tmp_path, "-t", "nrrd", "-p", "c")
    images = sorted(tmp_path.glob("c-*.nrrd"), key=lambda path: int(path.stem.split("-")[1]))
    np.testing.assert_array_equal(onto(images, where), expected_map(findings))
    told = json.loads((tmp_path / "c-meta.json").read_text())["segmentAttributes"]
    segments = [segment for group in told for segment in group]
    assert [segment["SegmentLabel"] for segment in segments] == ["Measurable lesions", "Non-measurable lesions"]
    shown = [codes.MEASURABLE_RGB, codes.NON_MEASURABLE_RGB]
    for segment, rgb in zip(segments, shown, strict=True):
        np.testing.assert_allclose(segment["recommendedDisplayRGBValue"], rgb, atol=2)  # by way of CIELab


def test_dcmqi_reads_the_label_map_object_voxel_for_voxel(tmp_path):
    findings, source = made.case("oblique")
    where = findings.lesion_labels.grid
    seg = dicom_seg.build_label_map(findings, source, IDENTITY, made.PRODUCED_AT, include_organ=True)
    seg.save_as(tmp_path / "labelmap.dcm", enforce_file_format=True)
    dcmqi("segimage2itkimage", "--inputDICOM", tmp_path / "labelmap.dcm", "--outputDirectory", tmp_path, "-t", "nrrd")
    (image,) = tmp_path.glob("*.nrrd")
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image)))
    expected = expected_map(findings)
    for number in (1, 2):
        one = SimpleITK.ReadImage(str(image)) == number
        SimpleITK.WriteImage(one, str(tmp_path / "one.mha"))
        np.testing.assert_array_equal(onto([tmp_path / "one.mha"], where) == 1, expected == number)
    assert np.count_nonzero(labels == 3) == np.count_nonzero((expected == 0) & (findings.organ.labels == 1))


def reported(path: Path, folder: Path) -> list[dict[str, object]]:
    """The measurement groups of a report, as dcmqi reads them."""
    out = folder / "sr.json"
    dcmqi("tid1500reader", "--inputDICOM", path, "--outputMetadata", out)
    groups: list[dict[str, object]] = json.loads(out.read_text())["Measurements"]
    return groups


def values(group: dict[str, object]) -> dict[tuple[str, str], float]:
    """(quantity, derivation or "") -> value."""
    found = {}
    for item in group["measurementItems"]:
        derivation = item.get("derivationModifier", {}).get("CodeMeaning", "")
        found[item["quantity"]["CodeMeaning"], derivation] = float(item["value"])
    return found


def test_dcmqi_reads_the_measurements(tmp_path):
    findings, source = made.case("oblique")
    _, alone, report = objects(findings, source, tmp_path)
    groups = reported(report, tmp_path)
    assert len(groups) == 2
    for lesion, group in zip(findings.lesions, groups, strict=True):
        assert group["TrackingIdentifier"] == f"Lesion {lesion.number}"
        assert group["TrackingUniqueIdentifier"] == lesion.tracking_uid
        assert int(group["ReferencedSegment"]) == lesion.number
        assert group["segmentationSOPInstanceUID"] == pydicom.dcmread(alone).SOPInstanceUID
        found = values(group)
        assert found["Volume", ""] == pytest.approx(lesion.volume_mm3 / 1000, abs=1e-6)
        assert found["Long axis", ""] == pytest.approx(lesion.long_axis.length_mm, abs=1e-6)
        assert found["Short axis", ""] == pytest.approx(lesion.short_axis.length_mm, abs=1e-6)
        assert found["Attenuation Coefficient", "Mean"] == pytest.approx(lesion.mean_hu, abs=1e-6)
        assert found["Attenuation Coefficient", "Standard Deviation"] == pytest.approx(lesion.sd_hu, abs=1e-6)


def test_the_published_liver_of_sets_02_and_03_comes_back_out_of_our_report(testdata, tmp_path):
    """The published report measures that very liver: 70,361.9 mm3, 37.3289 HU, SD 59.1691."""
    folder = testdata / "02_liver_ct_seg_dcmqi" / "segmentations"
    series = inspect(sorted((folder / "ct-3slice").iterdir()))
    ct = read_volume(series)
    as_one = {"lesion_labels": [1], "lesion_per_label": True}
    pipeline = GivenMasksPipeline(PipelineSettings(masks_path=folder / "liver.dcm", options=as_one))
    findings = measure(ct, pipeline.segment(ct), Criteria())
    _, _, report = objects(findings, headers(series), tmp_path)
    (group,) = reported(report, tmp_path)
    found = values(group)
    assert found["Volume", ""] * 1000 == pytest.approx(70_361.9, abs=0.05)
    assert found["Attenuation Coefficient", "Mean"] == pytest.approx(37.3289, abs=5e-5)
    assert found["Attenuation Coefficient", "Standard Deviation"] == pytest.approx(59.1691, abs=5e-5)


# ---- dcmjs ------------------------------------------------------------------------------------------

READ_WITH_DCMJS = """
const fs = require("fs");
const dcmjs = require("dcmjs");
const file = fs.readFileSync(process.argv[2]);
const read = dcmjs.data.DicomMessage.readFile(file.buffer.slice(file.byteOffset, file.byteOffset + file.length));
const seg = dcmjs.data.DicomMetaDictionary.naturalizeDataset(read.dict);
const pixels = dcmjs.data.BitArray.unpack(Array.isArray(seg.PixelData) ? seg.PixelData[0] : seg.PixelData);
const list = (x) => (Array.isArray(x) ? x : [x]);
const first = (x) => (Array.isArray(x) ? x[0] : x);
const size = seg.Rows * seg.Columns;
const frames = list(seg.PerFrameFunctionalGroupsSequence).map((group, n) => {
  const on = [];
  for (let i = 0; i < size; i++) if (pixels[n * size + i]) on.push(i);
  return {
    segment: first(group.SegmentIdentificationSequence).ReferencedSegmentNumber,
    image: first(first(group.DerivationImageSequence).SourceImageSequence).ReferencedSOPInstanceUID,
    on,
  };
});
const labels = list(seg.SegmentSequence).map((s) => s.SegmentLabel);
process.stdout.write(JSON.stringify({ labels, frames }));
"""


@pytest.mark.parametrize("orientation", ["axial", "axial from head to feet", "oblique"])
def test_dcmjs_reads_the_label_map_voxel_for_voxel(orientation, tmp_path):
    node = shutil.which("node")
    modules = PEERS / "dcmjs" / "node_modules"
    if node is None or not modules.is_dir():
        pytest.skip("dcmjs is not installed (./scripts/peers, with npm at hand)")
    findings, source = made.case(orientation)
    _, alone, _ = objects(findings, source, tmp_path)
    script = tmp_path / "read.cjs"
    script.write_text(READ_WITH_DCMJS)
    done = subprocess.run(
        [node, str(script), str(alone)], env=os.environ | {"NODE_PATH": str(modules)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["labels"] == ["L1 - measurable - 18.2 mm", "L2 - non-measurable - 4.3 mm"]
    slices = {ds.SOPInstanceUID: k for k, ds in enumerate(source)}
    found = np.zeros(findings.lesion_labels.grid.shape, dtype=int)
    for frame in read["frames"]:
        found[slices[frame["image"]]].reshape(-1)[frame["on"]] = frame["segment"]
    np.testing.assert_array_equal(found, findings.lesion_labels.labels)

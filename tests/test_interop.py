"""Orthanc as the PACS: it routes a real CT to the node, and the results appear in that very study."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import orthanc as orthanc_peer
import pydicom
import pytest
from made_series import files, given_uids
from orthanc import Pacs
from pydicom.uid import Comprehensive3DSRStorage

from salsa_node import codes, loopback, overview
from salsa_node.nifti import read_labels, write_labels
from salsa_node.overview import Standing
from salsa_node.regrid import onto
from salsa_node.series import inspect, read_volume
from salsa_node.store import Store, StoreSettings
from salsa_node.volume import LabelVolume

ROUTE = """
function OnStoredInstance(instanceId, tags, metadata, origin)
  if tags['Modality'] == 'CT' and origin['RequestOrigin'] ~= 'DicomProtocol' then
    SendToModality(instanceId, 'salsa')
  end
end
"""


@pytest.fixture
def node_port() -> int:
    return loopback.free_port()


@pytest.fixture
def pacs(tmp_path: Path, tool, node_port: int) -> Iterator[Pacs]:
    """Orthanc with its auto-routing rule."""
    (tmp_path / "route.lua").write_text(ROUTE)
    more = {
        "DicomModalities": {"salsa": ["SALSA_NODE", "127.0.0.1", node_port]},
        "LuaScripts": [str(tmp_path / "route.lua")],
    }
    with orthanc_peer.running(tool("Orthanc", "orthanc"), tmp_path / "orthanc", more) as running:
        yield running


def reference_masks(testdata: Path, axial: list[Path], path: Path) -> tuple[np.ndarray, float]:
    """Set 01's reference liver (1) with two balls drawn inside it (2, 3), as NIfTI; labels and voxel volume."""
    ct = read_volume(inspect(axial))
    reference = read_labels(testdata / "01_abdomen_ct_siemens_j2k" / "example_seg_dicom.nii.gz")
    labels = (onto(reference, ct.grid).labels == 5).astype(np.uint8)
    index = np.moveaxis(np.indices(labels.shape), 0, -1) * np.array(ct.grid.spacing_mm)
    deep = np.argwhere(labels[8] == 1)
    liver_center = np.array([8, *np.median(deep, axis=0)]) * np.array(ct.grid.spacing_mm)
    for value, (shift_mm, radius_mm) in enumerate((((0, 0, 0), 9.0), ((6, -20, 0), 4.0)), start=2):
        ball = ((index - liver_center - np.array(shift_mm)) ** 2).sum(axis=-1) <= radius_mm**2
        assert ball.sum() > 10
        assert (labels[ball] > 0).all(), "the ball must lie in the liver"
        labels[ball] = value
    write_labels(LabelVolume(labels, ct.grid), path)
    assert nib.load(path).shape == labels.shape[::-1]
    return labels, ct.grid.voxel_volume_mm3


def wait_done(store_url: str, study_uid: str, runs: int) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with Store.open(StoreSettings(store_url)) as store:
                seen = overview.glance(store, store.study(study_uid))
            if len(seen.runs) == runs and seen.standing in (Standing.DONE, Standing.FAILED, Standing.NOT_DELIVERED):
                assert seen.standing is Standing.DONE, (seen.latest, seen.deliveries)
                return
        except Exception as error:
            if type(error).__name__ != "UnknownStudy":
                raise
        assert time.monotonic() < deadline
        time.sleep(0.2)


def judged(path: Path, tool) -> pydicom.Dataset:
    """The object, once dcmtk has read all of it and dciodvfy found no error in it."""
    subprocess.run([tool("dcmdump"), str(path)], check=True, capture_output=True)
    ds = pydicom.dcmread(path)
    if ds.Modality == "SR":
        subprocess.run([tool("dsrdump"), str(path)], check=True, capture_output=True)
    verdict = subprocess.run([tool("dciodvfy", "dicom3tools"), str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in verdict.stderr.splitlines() if line.startswith("Error")]
    assert not errors, errors
    return ds


def record_of(reports: Iterable[pydicom.Dataset]) -> pydicom.Dataset:
    """The one record among the reports of a result; the others are for viewers."""
    (record,) = (ds for ds in reports if ds.SOPClassUID == Comprehensive3DSRStorage)
    return record


def test_a_real_ct_is_routed_analysed_and_answered_in_the_same_study(pacs, node_port, testdata, tool, tmp_path):
    orthanc, dicom_port = pacs, pacs.dicom_port
    (tmp_path / "set01").mkdir()
    axial = given_uids(
        files(testdata / "01_abdomen_ct_siemens_j2k" / "example_ct_dicom"), tmp_path / "set01",
        PatientName="Müller^Test", PatientID="SET01", AccessionNumber="A01",
    )  # fmt: skip
    assert len(axial) == 20
    study_uid = pydicom.dcmread(axial[0], stop_before_pixels=True).StudyInstanceUID
    config = tmp_path / "site.toml"
    config.write_text(
        f"""
[node]
data_dir = "{tmp_path / "data"}"
[listener]
port = {node_port}
[assembly]
quiet_s = 3.0
[[destination]]
name = "pacs"
ae_title = "ORTHANC"
host = "127.0.0.1"
port = {dicom_port}
"""
    )  # delivery.to stays "sender": Orthanc sent the study, so Orthanc gets the results
    store_url = f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}"

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *arguments, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with loopback.node(config, tmp_path / "node.log", node_port):
        assert cli("echo", "pacs").returncode == 0
        for path in axial:
            orthanc.upload(path)

        # the demo models never saw a real CT: whatever they find, a truthful report appears
        wait_done(store_url, study_uid, runs=1)
        earlier = orthanc.instances("SR", study_uid)
        report = record_of(judged(orthanc.fetch(one, tmp_path), tool) for one in earlier)
        assert "DEMO MODEL" in report.SeriesDescription
        shown = json.loads(cli("show", study_uid, "--json").stdout)
        by_demo = orthanc.instances("SEG", study_uid)
        assert bool(by_demo) == (shown["outcome"] == "lesions")
        for instance in by_demo + [one for kind in ("OT", "DOC", "KO") for one in orthanc.instances(kind, study_uid)]:
            judged(orthanc.fetch(instance, tmp_path), tool)

        # a person's masks: the reference liver, and two lesions drawn inside it
        labels, voxel_mm3 = reference_masks(testdata, axial, tmp_path / "masks.nii.gz")
        assert cli("rerun", study_uid, "--masks", str(tmp_path / "masks.nii.gz")).returncode == 0
        wait_done(store_url, study_uid, runs=2)

    seg_ids = set(orthanc.instances("SEG", study_uid)) - set(by_demo)
    segs = [judged(orthanc.fetch(one, tmp_path), tool) for one in seg_ids]
    (seg,) = (ds for ds in segs if ds.ContentLabel == "LIVER_LESIONS")
    sr_ids = set(orthanc.instances("SR", study_uid)) - set(earlier)
    predecessor = report.SOPInstanceUID
    report = record_of(judged(orthanc.fetch(one, tmp_path), tool) for one in sr_ids)
    (named,) = report.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert named.ReferencedSOPInstanceUID == predecessor
    source = pydicom.dcmread(axial[0], stop_before_pixels=True)
    for result in (seg, report):
        for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "AccessionNumber"):
            assert result.get(keyword) == source.get(keyword), keyword
        assert "DEMO" not in result.SeriesDescription
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    expected = sorted(float((labels == value).sum()) * voxel_mm3 / 1000 for value in (2, 3))
    groups = hd.sr.srread(report.filename).content.get_volumetric_roi_measurement_groups()
    volumes = sorted(float(group.get_measurements(name=codes.VOLUME)[0].value) for group in groups)
    assert volumes == pytest.approx(expected, abs=0.001)
    measurability = {
        item.value.value for group in groups for item in group.get_qualitative_evaluations(name=codes.MEASURABILITY)
    }
    assert measurability == {"MEASURABLE", "NONMEASURABLE"}
    on = sum(int(np.count_nonzero(frame)) for frame in np.atleast_3d(seg.pixel_array))
    assert on == int((labels >= 2).sum())

"""The same in a few lines of Python: read a scan, find its lesions, measure them, write a label map or a DICOM SEG.

pipeline = load("demo")
scan = read("scan.nii.gz")
findings = find(scan, pipeline)
write_labels(findings, scan, "lesions.nii.gz")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from salsa_node import batch, cases, config, dicom_seg, nifti, pipelines, preflight, series
from salsa_node.batch import Wanted
from salsa_node.cases import Scan
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import AS_ITS_IMAGES, Identity
from salsa_node.errors import EncodingError
from salsa_node.findings import Findings, measure
from salsa_node.limits import Limits
from salsa_node.pipelines import Pipeline, PipelineSettings


def load(
    name: str = "",
    *,
    device: str = "",
    models_dir: Path | str | None = None,
    options: Mapping[str, object] | None = None,
) -> Pipeline:
    """A pipeline with its weights in memory; keep it for all scans. "auto" is the best whose models are installed.

    What is not given is as `SALSA_NODE_CONFIG` says, else as the defaults are.
    Raises ConfigError for a name or an option that is not there, WeightsMissing where weights are absent.
    """
    settings = config.load(None)
    if models_dir is not None:
        settings = replace(settings, pipeline=replace(settings.pipeline, models_dir=str(models_dir)))
    settings = preflight.ready(settings, name, device)
    choice = settings.pipeline
    wanted = choice.options if options is None else options
    return pipelines.load(choice.name, PipelineSettings(choice.device, settings.models_dir, options=wanted))


def read(path: Path | str) -> Scan:
    """The CT at `path`: a NIfTI file, or a DICOM folder, of which the series fit for analysis is taken.

    Which series that is, and what is done with tilted or unevenly spaced slices, is as `SALSA_NODE_CONFIG` says.
    Raises SeriesRejected with the reason where there is none, or more than one study.
    """
    settings = config.load(None)
    return cases.open_scan(path, cases.Rules(settings.selection, settings.series))


def find(scan: Scan, pipeline: Pipeline, criteria: Criteria | None = None, limits: Limits | None = None) -> Findings:
    """The lesions of a scan, measured; `flags` says what the guards find odd about them.

    A flag that `blocks` would keep a node from sending the result: look at it before you use it.
    Raises PipelineError; OrganNotFound where there is no liver.
    """
    found = measure(scan.ct, batch.marked(scan, pipeline), criteria or Criteria())
    return batch.judged(scan.ct, found, limits or Limits())


def write_labels(findings: Findings, scan: Scan, path: Path | str, *, instances: bool = False) -> None:
    """A label map (.nii or .nii.gz) on the scan's own grid: 1 measurable, 2 not; or n for lesion n.

    Of tilted or unevenly spaced slices: on the upright grid that `salsa-node export` writes their voxels on.
    """
    wanted = Wanted(instances=instances)
    like = scan.case.path if scan.case.is_nifti else None
    told = batch.description(findings, wanted, "salsa_node, ")
    nifti.write_labels(batch.label_map(findings, wanted, scan), Path(path), told, like)


def write_seg(findings: Findings, scan: Scan, path: Path | str) -> tuple[Path, ...]:
    """DICOM Segmentations of the lesions by class, for a scan that was read from DICOM; the files written.

    One file, `path`, for all but the largest results: further ones are called `<stem>-2.dcm` and so on. None where
    there is no lesion. Raises EncodingError for a scan that was read from a NIfTI file.
    """
    if scan.series is None:
        raise EncodingError(
            "a NIfTI file has no DICOM images for a segmentation to refer to: use write_labels, or salsa-node run"
        )
    first = Path(path)
    written = []
    made = dicom_seg.build(findings, series.headers(scan.series), Identity(), AS_ITS_IMAGES)
    for number, ds in enumerate(made, start=1):
        file = first if number == 1 else first.with_name(f"{first.stem}-{number}{first.suffix}")
        ds.save_as(file, enforce_file_format=True)
        written.append(file)
    return tuple(written)

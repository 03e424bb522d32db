"""The main job on a fresh machine: a phantom study through a real node and back, judged by the truth.

A node process is started on free loopback ports with a store of its own; the study goes in by C-STORE,
segmentation and report come back by C-STORE to a receiver in this process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from rich.progress import track

from salsa_node import codes, console, loopback, overview, phantom, picture
from salsa_node.config import Config, load
from salsa_node.criteria import Criteria
from salsa_node.dicom_result import Identity, Kind
from salsa_node.errors import ConfigError, DeliveryError, PipelineError
from salsa_node.findings import Findings, measure
from salsa_node.overview import Standing
from salsa_node.pipelines import DEMO_NOTICE, PipelineSettings
from salsa_node.pipelines.given_masks import GivenMasksPipeline
from salsa_node.series import inspect, read_volume
from salsa_node.store import Store, StoreSettings

MUST_FIND_MM = 10.0  # a lesion of this longest diameter may not be missed
MUST_COVER = 0.25  # share of a lesion's voxels that a finding must hold to count as having found it
FINISH_S = 600.0
_ENDS = (Standing.DONE, Standing.FAILED, Standing.BLOCKED, Standing.NOT_DELIVERED, Standing.NOTHING, Standing.CANCELLED)

_CONFIG = """\
# The node of this demonstration; see config/salsa_node.toml for every key.
[node]
data_dir = {data_dir}

[listener]
port = {port}

[assembly]
quiet_s = 2.0
poll_s = 0.2

[pipeline]
name = "demo"

[delivery]
to = ["viewer"]
poll_s = 0.2

[[destination]]
name = "viewer"
ae_title = "VIEWER"
host = "127.0.0.1"
port = {receiver_port}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A true lesion beside what was found in its place, or a finding where there is none.

    lesion: the truth's number; None for a finding without truth. finding: numbers as sent, or None where missed.
    """

    lesion: int | None
    diameter_mm: float | None
    true_volume_ml: float | None
    finding: int | None
    disease: str | None
    long_axis_mm: float | None
    volume_ml: float | None

    @property
    def missed(self) -> bool:
        """A lesion that had to be found was not."""
        return self.finding is None and (self.diameter_mm or 0.0) >= MUST_FIND_MM


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What came of it.

    seconds: from the first C-STORE to the last result.
    """

    rows: tuple[Row, ...]
    seconds: float
    folder: Path
    files: tuple[Path, ...]

    @property
    def passed(self) -> bool:
        """No lesion of MUST_FIND_MM or more was missed."""
        return not any(row.missed for row in self.rows)

    def as_json(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "folder": str(self.folder),
            "files": [str(path) for path in self.files],
            "lesions": [asdict(row) | {"missed": row.missed} for row in self.rows],
        }


def run(output: Path, seed: int, quiet: bool = False) -> Demonstration:
    """Everything lies in `output` afterwards: the study, its truth, the node's data, the results and a picture.

    Raises PipelineError or DeliveryError where the node did not come to an end.
    """
    say: Callable[[str], None] = (lambda _: None) if quiet else console.put
    output = output.absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--output: {output} is no folder and cannot be made one ({exc.strerror})") from exc
    data_dir = output / "node"
    say(f"making a synthetic patient (seed {seed}) ...")
    study = phantom.make(phantom.Recipe(seed))
    written = phantom.write_study(study, output / "study", study=str(time.time_ns()))
    port, receiver_port = loopback.free_port(), loopback.free_port()
    config_path = output / "salsa_node.toml"
    config_path.write_text(
        _CONFIG.format(data_dir=json.dumps(data_dir.as_posix()), port=port, receiver_port=receiver_port)
    )
    config = load(config_path)
    results = output / "results"
    node_log = output / "node.log"
    with loopback.receiver(receiver_port, results) as received, loopback.node(config_path, node_log, port):
        begun = time.monotonic()
        files = [*written.localizer, *written.axial]
        say(f"sending {len(files)} images by C-STORE to the node at 127.0.0.1:{port} ...")
        loopback.send(track(files, "sending", disable=quiet or not sys.stdout.isatty()), port)
        _wait(config.store_url, written.study_uid, say)
        seconds = time.monotonic() - begun
    ct = read_volume(inspect(written.axial))
    seg, report = _of(received, "SEG", config, Kind.SEG), _of(received, "SR", config, Kind.SR)
    if report is None:
        raise DeliveryError(f"the node came to an end, but no report arrived; see {node_log}")
    files_out = sorted(set(received))
    rows = _missed_all(study)
    if seg is not None:
        masks = GivenMasksPipeline(PipelineSettings(masks_path=seg)).segment(ct)
        marked = replace(masks, provenance=replace(masks.provenance, notice=DEMO_NOTICE, by_person=False))
        found = measure(ct, marked, Criteria())
        rows = _compare(study, found, _reported(report))
        picture.overlay(ct, found, output / "overlay.png", truth=study.lesion_labels)
        files_out.append(output / "overlay.png")
    outcome = Demonstration(tuple(rows), seconds, output, tuple(files_out))
    _tell(outcome, written, say)
    return outcome


def _of(received: Sequence[Path], modality: str, config: Config, kind: Kind) -> Path | None:
    """The first object of that kind among those received: of its modality and its series number."""
    number = Identity(first_series_number=config.results.first_series_number).series_number(kind)
    for path in received:
        if path.name.startswith(f"{modality}-"):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesNumber"])
            if header.SeriesNumber == number:
                return path
    return None


def _tell(outcome: Demonstration, study: phantom.Study, say: Callable[[str], None]) -> None:
    say("")
    say(
        f"lesions found beside the truth, {outcome.seconds:.0f} s from the first image sent to the last result received"
    )
    if say is console.put:
        columns = {
            "lesion": ">true lesion",
            "diameter_mm": ">true diameter mm",
            "true_volume_ml": ">true volume ml",
            "finding": ">finding",
            "disease": "RECIST 1.1",
            "long_axis_mm": ">long axis mm",
            "volume_ml": ">volume ml",
        }
        console.put_table(columns, [asdict(row) for row in outcome.rows])
    for path in outcome.files:
        say(f"{path}")
    say(f"{study.truth_labels.parent} (the study as sent, with its truth)")
    say(f"to see more: {sys.argv[0]} show {study.study_uid} --config '{outcome.folder / 'salsa_node.toml'}'")
    say(f"{DEMO_NOTICE}. AI candidate findings. Not a diagnosis.")
    beyond = sum(row.lesion is None for row in outcome.rows)
    if beyond:
        say(f"{beyond} of the findings lie where there is no lesion")
    missed = [row.lesion for row in outcome.rows if row.missed]
    say(f"MISSED: lesion {', '.join(map(str, missed))}" if missed else "every lesion of 10 mm or more was found")


def _compare(study: phantom.Phantom, found: Findings, reported: dict[int, tuple[float, float]]) -> list[Row]:
    """Truth and findings side by side; axes and volumes as the report states them."""
    truth, seen = study.lesion_labels.labels, found.lesion_labels.labels
    rows = []
    matched: set[int] = set()
    for lesion in study.lesions:
        counts = np.bincount(seen[truth == lesion.number], minlength=1)
        counts[0] = 0
        number = int(counts.argmax()) if counts.any() else None
        if number is not None and counts[number] < MUST_COVER * (truth == lesion.number).sum():
            number = None
        matched |= {int(n) for n in np.flatnonzero(counts)}
        rows.append(_row(found, reported, number, lesion.number, lesion.diameter_mm, lesion.volume_mm3 / 1000))
    unmatched = [finding.number for finding in found.lesions if finding.number not in matched]
    return rows + [_row(found, reported, number, None, None, None) for number in unmatched]


def _row(
    found: Findings,
    reported: dict[int, tuple[float, float]],
    number: int | None,
    lesion: int | None,
    diameter_mm: float | None,
    true_volume_ml: float | None,
) -> Row:
    if number is None:
        return Row(lesion, diameter_mm, true_volume_ml, None, None, None, None)
    long_axis_mm, volume_ml = reported[number]
    disease = found.lesions[number - 1].disease.value
    return Row(lesion, diameter_mm, true_volume_ml, number, disease, long_axis_mm, volume_ml)


def _missed_all(study: phantom.Phantom) -> list[Row]:
    return [Row(t.number, t.diameter_mm, t.volume_mm3 / 1000, None, None, None, None) for t in study.lesions]


def _reported(path: Path) -> dict[int, tuple[float, float]]:
    """(long axis in mm, volume in ml) of each lesion number, read from the report as it was received."""
    numbers = {}
    report = hd.sr.srread(path).content
    assert isinstance(report, hd.sr.MeasurementReport), "a TID 1500 report"
    for group in report.get_volumetric_roi_measurement_groups():
        number = int(str(group.tracking_identifier).split()[-1])
        long_axis = group.get_measurements(name=codes.LONG_AXIS)[0].value
        volume = group.get_measurements(name=codes.VOLUME)[0].value
        numbers[number] = (float(long_axis), float(volume))
    return numbers


def _wait(store_url: str, study_uid: str, say: Callable[[str], None]) -> None:
    """Until the study stands where it will stay, telling each change."""
    deadline = time.monotonic() + FINISH_S
    told = ""
    with Store.open(StoreSettings(store_url)) as store:
        while time.monotonic() < deadline:
            seen = overview.glance(store, store.study(study_uid))
            stages = [event.detail for event in store.events_of(study_uid) if event.name == "run.stage"]
            now = (
                f"{seen.standing.value}: {stages[-1]}"
                if seen.standing is Standing.RUNNING and stages
                else seen.standing.value
            )
            if now != told:
                say(f"  {now} ...")
                told = now
            if seen.standing is Standing.DONE:
                return
            if seen.standing in _ENDS:
                why = next((run.error for run in seen.latest if run.error), "see the node's log")
                raise PipelineError(f"the study ended as {seen.standing.value}: {why}")
            time.sleep(0.2)
    raise PipelineError(f"no result within {FINISH_S:.0f} s; the study stands at {told}")

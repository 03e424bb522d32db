"""A radiologist's viewer shows what we send: OHIF in a headless Chromium, judged by its own services and by pixels.

Screenshots and what the viewer said are kept in $SALSA_NODE_ARTEFACTS, where that names a folder.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ohif
import orthanc
import pytest
from PIL import Image

from salsa_node import codes, offline, phantom
from salsa_node.config import Config
from salsa_node.findings import Findings, measure
from salsa_node.pipelines import PipelineSettings
from salsa_node.pipelines.given_masks import GivenMasksPipeline
from salsa_node.series import inspect, read_volume

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (./scripts/test)")

FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
PATIENCE_MS = 120_000
SEEN: dict[str, object] = {}


@dataclass(frozen=True)
class Study:
    """What was sent to the PACS, and what it should look like."""

    uid: str
    findings: Findings


class Screen:
    """The viewer's page, asked in the viewer's own words."""

    def __init__(self, page: playwright.Page, folder: Path) -> None:
        self.page = page
        self.folder = folder

    def open_series(self, number: int) -> None:
        entry = self.page.locator('[data-cy^="study-browser-thumbnail"]').filter(has_text=f"S:{number}")
        entry.first.dblclick(timeout=PATIENCE_MS)

    def viewport(self, words: str, argument: object = None) -> object:
        """The value of a JavaScript expression in `v` (the viewport), `id` (its name), `s` (the services), `a`."""
        script = f"""(a) => {{ const s = window.services; const id = s.viewportGridService.getActiveViewportId();
            const v = s.cornerstoneViewportService.getCornerstoneViewport(id); return {words}; }}"""
        return self.page.evaluate(script, argument)

    def until(self, words: str) -> None:
        self.page.wait_for_function(f"() => {{ const s = window.services; return {words}; }}", timeout=PATIENCE_MS)

    def show_slice(self, sop_instance_uid: str) -> None:
        wanted = "v.getImageIds().findIndex(x => x.includes('/' + a + '/'))"
        index = self.viewport(wanted, sop_instance_uid)
        assert isinstance(index, int)
        assert index >= 0, "the viewport does not hold that image"
        self.viewport("v.setImageIdIndex(a)", index)
        self.until(
            "s.cornerstoneViewportService.getCornerstoneViewport(s.viewportGridService.getActiveViewportId())"
            f".getCurrentImageIdIndex() === {index}"
        )
        self.page.wait_for_timeout(1500)  # the frame is drawn some time after its index is set

    def at(self, point_lps_mm: tuple[float, float, float]) -> tuple[int, int]:
        """Where a point of the patient lies on the screen: (x, y)."""
        x, y = self.viewport("v.worldToCanvas(a)", list(point_lps_mm))  # type: ignore[misc]
        box = self.page.locator(".cornerstone-canvas").first.bounding_box()
        assert box is not None
        return round(box["x"] + x), round(box["y"] + y)

    def pixels(self, name: str) -> np.ndarray:
        """(height, width, 3) of the screen, which is kept under that name."""
        content = self.page.screenshot()
        (self.folder / f"{name}.png").write_bytes(content)
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def screen(tool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Screen, Study]]:
    """OHIF with the study of a phantom and its results open."""
    dist, chromium, program = ohif.pages(), tool("chromium", "chromium"), tool("Orthanc", "orthanc")
    if not orthanc.DICOMWEB.exists():
        pytest.skip("Orthanc's DICOMweb plugin is not installed (apt-get install orthanc-dicomweb)")
    folder = tmp_path_factory.mktemp("viewer")
    artefacts = Path(os.environ.get("SALSA_NODE_ARTEFACTS", folder))
    artefacts.mkdir(parents=True, exist_ok=True)
    made = phantom.write_study(phantom.make(phantom.Recipe(2)), folder / "study")
    wanted = offline.Wanted(folder / "results", "given_masks", {}, made.truth_labels)
    (result,) = offline.run([made.axial[0].parent], wanted, Config())
    assert result.analysed, result.told
    ct = read_volume(inspect(made.axial))
    masks = GivenMasksPipeline(PipelineSettings(masks_path=made.truth_labels)).segment(ct)
    study = Study(made.study_uid, measure(ct, masks, Config().criteria))
    more = {"Plugins": [str(orthanc.DICOMWEB)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}}
    with orthanc.running(program, folder / "orthanc", more) as pacs:
        for path in [*made.axial, *sorted((folder / "results").glob("*.dcm"))]:
            pacs.upload(path)
        with ohif.serving(dist, pacs.url) as url, playwright.sync_playwright() as play:
            as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = play.chromium.launch(executable_path=chromium, args=FLAGS + as_root)
            page = browser.new_page(viewport={"width": 1500, "height": 900})
            page.goto(f"{url}/viewer?StudyInstanceUIDs={study.uid}", wait_until="domcontentloaded")
            page.locator(".cornerstone-canvas").first.wait_for(timeout=PATIENCE_MS)
            page.get_by_text("Skip all").first.click(timeout=PATIENCE_MS)  # the viewer's tour
            yield Screen(page, artefacts), study
            (artefacts / "viewer.json").write_text(json.dumps(SEEN, indent=2))
            browser.close()


def test_the_segments_load_with_our_names_and_colours_and_cover_the_lesions(screen):
    shown, study = screen
    shown.open_series(9001)
    shown.page.locator('[data-cy="yes-hydrate-btn"]').click(timeout=PATIENCE_MS)
    shown.until("s.segmentationService.getSegmentations().length === 1")
    shown.page.wait_for_timeout(2000)
    segments = shown.viewport(
        "s.segmentationService.getSegmentations().map(x => Object.values(x.segments).map(y => "
        "[y.label, s.segmentationService.getSegmentColor(id, x.segmentationId, y.segmentIndex).slice(0, 3)]))[0]"
    )
    assert segments == [
        ["Measurable lesions", list(codes.MEASURABLE_RGB)],
        ["Non-measurable lesions", list(codes.NON_MEASURABLE_RGB)],
    ]
    for lesion in study.findings.lesions:
        shown.show_slice(lesion.slice_sop_uid)
        screen_pixels = shown.pixels(f"segmentation-lesion-{lesion.number}")
        middle = tuple(np.mean([lesion.long_axis.start_lps_mm, lesion.long_axis.end_lps_mm], axis=0))
        x, y = shown.at(middle)
        red, green, blue = screen_pixels[y, x]
        beside_x, beside_y = shown.at(beside(study.findings, lesion.number))
        assert np.ptp(screen_pixels[beside_y, beside_x]) <= 12, "beside the lesion the image is grey"
        assert red - blue > 60, f"lesion {lesion.number} is not covered: {screen_pixels[y, x]}"
        measurable = lesion.disease.value == "measurable"
        assert (green - blue > 60) != measurable, "red is measurable, yellow is not"


def beside(findings: Findings, number: int) -> tuple[float, float, float]:
    """A point in the lesion's slice, a few pixels away from every lesion."""
    lesion = findings.lesions[number - 1]
    labels, grid = findings.lesion_labels.labels, findings.lesion_labels.grid
    k = lesion.slice_index
    rows, columns = np.nonzero(labels[k] == number)
    row = round(rows.mean())
    for column in range(columns.max() + 4, labels.shape[2]):
        if not labels[k, row - 3 : row + 4, column - 3 : column + 4].any():
            return grid.to_lps_mm((k, row, column))
    raise AssertionError("no room beside the lesion")


def test_the_panel_names_the_segments(screen):
    shown, _ = screen
    shown.page.locator('[data-cy="panelSegmentation-btn"]').first.click()
    for name in ("Measurable lesions", "Non-measurable lesions"):
        shown.page.get_by_text(name, exact=True).first.wait_for(timeout=PATIENCE_MS)
    shown.pixels("segmentation-panel")


def test_each_lesion_has_a_segment_that_says_how_long_it_is(screen):
    shown, study = screen
    shown.open_series(9003)
    shown.page.locator('[data-cy="yes-hydrate-btn"]').click(timeout=PATIENCE_MS)
    shown.until("s.segmentationService.getSegmentations().length === 2")
    labels = shown.viewport(
        "s.segmentationService.getSegmentations().map(x => Object.values(x.segments).map(y => y.label))[1]"
    )
    assert labels == [
        f"L{lesion.number} - {lesion.disease.value} - {lesion.long_axis.length_mm:.1f} mm"
        for lesion in study.findings.lesions
    ]
    assert [label.partition(" - ")[0] for label in labels] == ["L1", "L2", "L3", "L4"]


def test_the_diameters_are_drawn_where_they_were_measured(screen):
    shown, study = screen
    shown.open_series(9004)
    measured = "s.displaySetService.getActiveDisplaySets().find(x => x.SeriesNumber == 9004).measurements"
    shown.until(f"({measured} || []).length > 0 && {measured}.some(m => m.loaded)")
    shown.page.wait_for_timeout(3000)
    said = shown.viewport(f"{measured}.map(m => m.labels.map(l => [l.label, l.value]))")
    assert said == [
        [["Long Axis", f"{n.long_axis.length_mm:.2f} mm"], ["Short Axis", f"{n.short_axis.length_mm:.2f} mm"]]
        for n in study.findings.lesions
    ]
    first = study.findings.lesions[0]
    screen_pixels = shown.pixels("diameters")
    for axis in (first.long_axis, first.short_axis):
        start, end = (np.array(shown.at(point)) for point in (axis.start_lps_mm, axis.end_lps_mm))
        along = [np.rint(start + (end - start) * part).astype(int) for part in np.linspace(0, 1, 60)]
        green = [is_green(screen_pixels[y - 2 : y + 3, x - 2 : x + 3]) for x, y in along]
        assert np.mean(green) > 0.4, "a dashed line runs from end to end"
        assert any(green[:8]), "it begins where the axis begins"
        assert any(green[-8:]), "it ends where the axis ends"
    x_mm, y_mm, z_mm = first.long_axis.start_lps_mm
    aside = [shown.at((x_mm + dx, y_mm, z_mm)) for dx in (-30, -25, -20)]
    assert not any(is_green(screen_pixels[y - 2 : y + 3, x - 2 : x + 3]) for x, y in aside)
    SEEN["can be rehydrated"] = shown.viewport(
        "s.displaySetService.getActiveDisplaySets().find(x => x.SeriesNumber == 9004).isRehydratable"
    )
    assert SEEN["can be rehydrated"] is True


def is_green(patch: np.ndarray) -> bool:
    """Whether the colour of the viewer's annotations is in it."""
    return bool(((patch[..., 1] - patch[..., 0] > 60) & (patch[..., 1] - patch[..., 2] > 60)).any())


def test_rehydration_is_tried_and_its_outcome_kept(screen):
    """The viewer offers to track the measurements; what comes of it is written down, not asserted."""
    shown, _ = screen
    offer = shown.page.get_by_role("button", name="Yes")
    SEEN["offers to track"] = offer.count() > 0
    if offer.count():
        offer.first.click()
        shown.page.wait_for_timeout(3000)
    SEEN["measurements tracked"] = shown.viewport("s.measurementService.getMeasurements().map(m => m.toolName)")
    shown.pixels("rehydrated")
    assert set(SEEN) >= {"can be rehydrated", "offers to track", "measurements tracked"}


def test_the_summary_page_opens_as_a_picture(screen):
    shown, _ = screen
    shown.open_series(9005)
    shown.until("s.displaySetService.getActiveDisplaySets().some(x => x.SeriesNumber == 9005)")
    shown.page.wait_for_timeout(4000)
    pixels = shown.pixels("summary-page")
    box = shown.page.locator(".cornerstone-canvas").first.bounding_box()
    inside = pixels[int(box["y"]) : int(box["y"] + box["height"]), int(box["x"]) : int(box["x"] + box["width"])]
    assert (inside.min(axis=2) > 240).mean() > 0.1, "paper is white"

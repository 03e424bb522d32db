"""SALSA's pipeline against the same chain driven the upstream way, on any grid, and on what it must refuse."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import upstream_salsa

from salsa_node.errors import ConfigError, OrganNotFound, SeriesRejected, WeightsMissing
from salsa_node.models import DEMO_STAGES, demo_models_dir
from salsa_node.nifti import read_ct, read_labels, write_ct, write_labels
from salsa_node.phantom import Phantom, Recipe, make
from salsa_node.pipelines import DEMO_NOTICE, Flag, Pipeline, PipelineSettings, load
from salsa_node.pipelines.salsa import LiverFinder, SalsaPipeline
from salsa_node.pipelines.salsa_steps import OUTSIDE_HU
from salsa_node.volume import CtVolume, Grid, LabelVolume

MIDDLE = (-50.0, -5.0, 5.0)  # of a window in the liver that keeps the networks' work small
# Every other slice, row or column of some lies half-way between two at 1 mm: there MONAI's rounding errors decide.
RECIPES = {
    "axial": Recipe(43, (30, 50, 50), (4.19, 2.41, 2.41), center_lps_mm=MIDDLE),
    "half-way both ways": Recipe(43, (50, 50, 50), (2.5, 2.0, 2.0), center_lps_mm=MIDDLE),
    "from head to feet": Recipe(50, (24, 50, 44), (5.0, 2.5, 2.75), "IPL", center_lps_mm=MIDDLE),
    "oblique": Recipe(43, (30, 50, 50), (4.19, 2.41, 2.41), "SPL", (6.0, -4.0, 3.0), center_lps_mm=MIDDLE),
    "a gantry's turn": Recipe(51, (30, 50, 50), (4.0, 2.0, 2.0), "SPL", (0.0, 0.0, 2.0), center_lps_mm=MIDDLE),
}
SMALL = Recipe(43, (12, 24, 24), (5.0, 2.5, 2.5), center_lps_mm=(-70.0, 8.0, -4.0))


@dataclass(frozen=True)
class KnownLiver:
    """A liver finder that is told the answer."""

    labels: LabelVolume
    weights_sha256: Mapping[str, str]
    parameters: Mapping[str, object]
    flags: tuple[Flag, ...] = ()
    ran_on: str = "cpu"
    unloaded: list[str] = field(default_factory=list)

    def liver(self, ct: CtVolume) -> LabelVolume:
        assert ct.grid.matches(self.labels.grid)
        return self.labels

    def unload(self) -> None:
        self.unloaded.append("liver")


def known(labels: LabelVolume) -> LiverFinder:
    return KnownLiver(labels, {"liver": "0" * 64}, {"known": True})


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's two lesion networks, in SALSA's own layout."""
    folder: Path = tmp_path_factory.mktemp("models")
    for stage in ("lowres", "cascade"):
        source = demo_models_dir() / DEMO_STAGES[stage]
        shutil.copytree(source, folder / "salsa" / "Dataset001_TALES" / source.name)
    return folder


def pipeline(models_dir: Path, liver: LabelVolume, **options: object) -> SalsaPipeline:
    quick = {"mirroring": False, "tile_step": 1.0}
    return SalsaPipeline(PipelineSettings("cpu", models_dir, options=quick | options), known(liver))


# ---- against the upstream way -------------------------------------------------------------------


@pytest.fixture(scope="module", params=RECIPES, ids=list(RECIPES))
def case(request: pytest.FixtureRequest) -> Phantom:
    return make(RECIPES[request.param])


@pytest.mark.filterwarnings("ignore")  # MONAI's and nnU-Net's own, which are many
def test_the_labels_are_those_of_the_upstream_chain(case: Phantom, models_dir: Path, tmp_path: Path) -> None:
    """Files, MONAI and nnU-Net's file API, as liver-SALSA drives them: not one voxel differs."""
    write_ct(case.ct, tmp_path / "scan.nii.gz")
    write_labels(case.liver, tmp_path / "liver.nii.gz")
    ct, liver = read_ct(tmp_path / "scan.nii.gz"), read_labels(tmp_path / "liver.nii.gz")
    found = pipeline(models_dir, liver, preset="salsa-2025").segment(ct).lesions.labels > 0
    made = upstream_salsa.preprocess(tmp_path)
    upstream_salsa.predict(tmp_path, models_dir / "salsa/Dataset001_TALES", tile_step=1.0, mirroring=False, pools=False)
    theirs = upstream_salsa.restore(tmp_path, made) > 0
    assert theirs.shape == found.shape
    assert theirs.sum() > 1000
    assert np.count_nonzero(found != theirs) == 0


def test_nnunets_own_engine_gives_the_same_labels(models_dir: Path) -> None:
    case = make(SMALL)
    own, reference = (pipeline(models_dir, case.liver, engine=engine) for engine in ("own", "reference"))
    assert np.array_equal(own.segment(case.ct).lesions.labels, reference.segment(case.ct).lesions.labels)
    assert own.provenance.digest != reference.provenance.digest


# ---- geometry: with networks that answer by attenuation ------------------------------------------


@pytest.fixture
def by_attenuation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two stages mark what is darker than liver within the crop, so that every voxel's fate is known."""

    def predict(_network: object, ct: CtVolume, previous: LabelVolume | None = None) -> LabelVolume:
        return LabelVolume(((ct.voxels_hu > OUTSIDE_HU / 2) & (ct.voxels_hu < 70)).astype(np.uint8), ct.grid)

    monkeypatch.setattr("salsa_node.pipelines.nnunet.Network.predict", predict)


def liver_block(grid: Grid, liver_mm: tuple[tuple[float, float], ...], lesion_mm: tuple[tuple[float, float], ...]):
    """A CT of 100 HU, a block of it liver, with a block of lesion at 40 HU in it; both in LPS mm along x, y, z."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    place = index @ grid.affine_lps_mm[:3, :3].T + grid.affine_lps_mm[:3, 3]

    def inside(block: tuple[tuple[float, float], ...]) -> np.ndarray:
        return np.logical_and.reduce([(place[..., n] >= a) & (place[..., n] < b) for n, (a, b) in enumerate(block)])

    liver, lesion = inside(liver_mm), inside(lesion_mm)
    voxels = np.where(lesion, 40, 100).astype(np.int16)
    return CtVolume(voxels, grid), LabelVolume(liver.astype(np.uint8), grid), lesion


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.usefixtures("by_attenuation")
@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((60, 50, 50), (2.0, 2.0, 2.0)),
        ((200, 60, 40), (0.5, 1.5, 2.5)),
        ((14, 60, 60), (10.0, 2.0, 2.0)),
        ((3, 60, 60), (10.0, 2.0, 2.0)),
        ((300, 40, 40), (0.3, 3.0, 3.0)),
    ],
)
@pytest.mark.parametrize("orientation", ["SPL", "IAR", "LSP", "AIL"])
def test_a_lesion_comes_back_where_it_was(
    models_dir: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], orientation: str
) -> None:
    grid = Recipe(1, shape, spacing_mm, orientation=orientation).grid
    reach = np.abs(grid.affine_lps_mm[:3, :3] @ np.array(shape)) / 2
    middle = np.array(grid.to_lps_mm(tuple((n - 1) / 2 for n in shape)))  # type: ignore[arg-type]
    liver = tuple((m - 0.8 * r, m + 0.8 * r) for m, r in zip(middle, reach, strict=True))
    lesion = tuple((m - 0.2 * r, m + 0.5 * r) for m, r in zip(middle, reach, strict=True))
    ct, organ, truth = liver_block(grid, liver, lesion)
    masks = pipeline(models_dir, organ).segment(ct)
    assert truth.any()
    # at the lesion's faces the 1 mm image is a mixture of 40 and 100 HU; the middle of it decides
    assert dice(masks.lesions.labels > 0, truth) > 0.8
    assert abs(centre(masks.lesions.labels > 0) - centre(truth)).max() <= 0.5
    assert masks.lesions.grid is grid
    assert masks.organ is not None
    assert (masks.organ.labels[organ.labels > 0] == 1).all()


@pytest.mark.usefixtures("by_attenuation")
@pytest.mark.parametrize("orientation", ["SPL", "IAR", "LSP", "AIL"])
def test_upstreams_way_brings_a_lesion_back_where_it_was_too(models_dir: Path, orientation: str) -> None:
    """Also where the axes are not those of an axial scan, and upstream itself mistakes one spacing for another."""
    grid = Recipe(1, (60, 50, 40), (1.6, 2.0, 2.4), orientation=orientation).grid
    middle = np.array(grid.to_lps_mm((29.5, 24.5, 19.5)))
    liver, lesion = (tuple((m + a, m + b) for m in middle) for a, b in ((-36.0, 36.0), (-8.0, 20.0)))
    ct, organ, truth = liver_block(grid, liver, lesion)
    found = pipeline(models_dir, organ, preset="salsa-2025").segment(ct).lesions.labels > 0
    assert dice(found, truth) > 0.8
    assert abs(centre(found) - centre(truth)).max() <= 0.5


def centre(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0)


@pytest.mark.usefixtures("by_attenuation")
@pytest.mark.parametrize("preset", ["salsa", "salsa-2025"])
def test_a_liver_at_the_edge_of_the_scan_keeps_its_lesion_in_the_last_slice(models_dir: Path, preset: str) -> None:
    grid = Recipe(1, (40, 60, 60), (2.0, 2.0, 2.0)).grid
    top = grid.to_lps_mm((39, 0, 0))[2]
    everywhere = ((-50.0, 50.0), (-50.0, 50.0), (top - 60, top + 1))
    ct, organ, truth = liver_block(grid, everywhere, ((-10.0, 10.0), (-10.0, 10.0), (top - 3, top + 1)))
    assert truth[39].any()
    found = pipeline(models_dir, organ, preset=preset).segment(ct).lesions.labels > 0
    if preset == "salsa":
        assert dice(found, truth) > 0.9
    else:
        assert not found[39].any()  # its closing eats 10 mm of a liver that the scan cuts; 8 stay lost


@pytest.mark.parametrize("answer", ["dark", "all", "nothing"])
@pytest.mark.parametrize("preset", ["salsa", "salsa-2024"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(1, (40, 40, 44), (2.0, 2.5, 2.0)),
        Recipe(1, (44, 40, 20), (1.9, 1.3, 4.0), "AIL", (5.0, -7.0, 11.0)),
        Recipe(1, (60, 34, 36), (0.4, 2.2, 2.1), "IRA"),
    ],
)
def test_what_nobody_watches_is_found_without_the_whole_scan(
    models_dir: Path, recipe: Recipe, preset: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks to the last voxel, whatever the networks mark: also in the padding of their crop."""

    def predict(_network: object, ct: CtVolume, previous: LabelVolume | None = None) -> LabelVolume:
        hu = ct.voxels_hu
        marked = {"dark": (hu > OUTSIDE_HU / 2) & (hu < 70), "all": hu > -9999, "nothing": hu > 9999}[answer]
        return LabelVolume(marked.astype(np.uint8), ct.grid)

    monkeypatch.setattr("salsa_node.pipelines.nnunet.Network.predict", predict)
    middle = recipe.grid.to_lps_mm(tuple((n - 1) / 2 for n in recipe.shape))  # type: ignore[arg-type]
    liver = tuple((m - 15.0, m + 90.0) for m in middle)
    lesion = tuple((m - 9.0, m + 8.0) for m in middle)
    ct, organ, _ = liver_block(recipe.grid, liver, lesion)
    salsa = pipeline(models_dir, organ, preset=preset)
    quick, watched = salsa.segment(ct), salsa.segment(ct, lambda _name, _volume: None)
    for one, other in ((quick.organ, watched.organ), (quick.lesions, watched.lesions)):
        assert one is not None
        assert other is not None
        assert one.labels.dtype == other.labels.dtype == np.uint8
        assert one.labels.tobytes() == other.labels.tobytes()
        assert one.grid is ct.grid
    assert quick.organ is not None
    beyond = np.count_nonzero(quick.lesions.labels > organ.labels)  # the liver was widened before they looked
    assert np.count_nonzero(quick.organ.labels) == np.count_nonzero(organ.labels) + beyond
    assert quick.lesions.labels.any() == (answer != "nothing")
    assert (beyond > 0) == (answer == "all")


# ---- what it refuses, keeps and says --------------------------------------------------------------


def test_no_liver_is_a_verdict(models_dir: Path) -> None:
    case = make(SMALL)
    nothing = LabelVolume(np.zeros_like(case.liver.labels), case.ct.grid)
    with pytest.raises(OrganNotFound, match="no voxel was marked as liver"):
        pipeline(models_dir, nothing).segment(case.ct)


def test_voxels_that_are_no_numbers_are_refused(models_dir: Path) -> None:
    case = make(SMALL)
    broken = case.ct.voxels_hu.astype(np.float32)
    broken[3, 4, 5] = np.nan
    with pytest.raises(SeriesRejected, match="not finite"):
        pipeline(models_dir, case.liver).segment(CtVolume(broken, case.ct.grid))


def test_a_second_case_loads_nothing_and_unload_frees(models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "salsa_node")
    case = make(SMALL)
    salsa = pipeline(models_dir, case.liver)
    loads = [record for record in caplog.records if getattr(record, "event", "") == "network.loaded"]
    assert len(loads) == 2
    first, second = salsa.segment(case.ct), salsa.segment(case.ct)
    assert np.array_equal(first.lesions.labels, second.lesions.labels)
    assert [r for r in caplog.records if getattr(r, "event", "") == "network.loaded"] == loads
    salsa.unload()
    assert caplog.text.count("network unloaded") == 2


def test_unloading_lets_go_of_the_liver_too(models_dir: Path) -> None:
    finder = KnownLiver(make(SMALL).liver, {"liver": "0" * 64}, {})
    SalsaPipeline(PipelineSettings("cpu", models_dir), finder).unload()
    assert finder.unloaded == ["liver"]


@pytest.mark.parametrize(
    ("options", "mirroring", "tile_step"),
    [({}, True, 0.5), ({"mirroring": False, "tile_step": 1}, False, 1.0)],
)
def test_both_stages_slide_as_upstream_does_unless_told_otherwise(
    models_dir: Path, options: dict[str, object], mirroring: bool, tile_step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salsa_node.pipelines.nnunet.cpu_has_bfloat16", lambda: True)
    settings = PipelineSettings("cpu", models_dir, options=options)
    salsa = SalsaPipeline(settings, known(make(SMALL).liver))
    for network in (salsa._lowres, salsa._cascade):
        assert network._predictor.use_mirroring is mirroring
        assert network._predictor.tile_step_size == tile_step
        assert network.precision == "float32"
    told = salsa.provenance.parameters
    assert (told["mirroring"], told["tile_step"], told["precision"]) == (mirroring, tile_step, "float32")


@pytest.mark.usefixtures("by_attenuation")
def test_what_befell_any_of_its_networks_is_told(models_dir: Path) -> None:
    case = make(SMALL)
    flags = [Flag("device_exhausted", f"of the {name}") for name in ("liver", "first stage", "second stage")]
    finder = replace(KnownLiver(case.liver, {"liver": "0" * 64}, {}), flags=(flags[0],), ran_on="cuda:0")
    salsa = SalsaPipeline(PipelineSettings("cpu", models_dir), finder)
    salsa._lowres.flags, salsa._cascade.flags = (flags[1],), (flags[2],)
    masks = salsa.segment(case.ct)
    assert masks.flags == tuple(flags)
    assert masks.provenance.device == "cuda:0; cpu"


@pytest.mark.usefixtures("by_attenuation")
def test_the_observer_sees_what_upstream_keeps(models_dir: Path, tmp_path: Path) -> None:
    liver, lesion = ((-40.0, 40.0),) * 3, ((-5.0, 25.0),) * 3
    ct, organ, _ = liver_block(Recipe(1, (25, 60, 50), (5.0, 2.0, 2.5), "IPL").grid, liver, lesion)
    seen: dict[str, CtVolume | LabelVolume] = {}
    pipeline(models_dir, organ).segment(ct, seen.__setitem__)
    assert list(seen) == [
        "liver", "liver_resampled", "liver_postprocessed", "scan_resampled", "cropped/scan_0000",
        "cropped/mask_0000", "mask_resampled",
    ]  # fmt: skip
    scan, mask = seen["cropped/scan_0000"], seen["cropped/mask_0000"]
    assert isinstance(scan, CtVolume)
    assert isinstance(mask, LabelVolume)
    assert scan.grid.matches(mask.grid)
    write_ct(scan, tmp_path / "scan.nii.gz")
    assert read_ct(tmp_path / "scan.nii.gz").grid.matches(scan.grid)
    write_labels(mask, tmp_path / "mask.nii.gz")
    # the crop's own affine puts its lesions where the lesions of the whole scan are
    back, whole = read_labels(tmp_path / "mask.nii.gz"), seen["mask_resampled"]
    assert isinstance(whole, LabelVolume)
    assert whole.labels.any()
    places = [np.array(one.grid.to_lps_mm(tuple(centre(one.labels > 0)))) for one in (back, whole)]  # type: ignore[arg-type]
    assert np.linalg.norm(places[0] - places[1]) < 0.01


def test_demo_networks_in_salsas_folder_are_told_as_such(models_dir: Path) -> None:
    case = make(SMALL)
    provenance = pipeline(models_dir, case.liver).provenance
    assert provenance.notice == DEMO_NOTICE
    assert provenance.parameters["preset"] == "salsa"
    assert {"torch", "nnunetv2", "TotalSegmentator"} <= provenance.libraries.keys()
    assert "monai" not in provenance.libraries
    assert "monai" in pipeline(models_dir, case.liver, preset="salsa-2025").provenance.libraries
    assert sum(name.endswith("checkpoint_final.pth") for name in provenance.weights_sha256) == 2


def test_other_presets_are_other_results(models_dir: Path) -> None:
    case = make(SMALL)
    digests = {pipeline(models_dir, case.liver, preset=name).provenance.digest for name in ("salsa", "salsa-2025")}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "salsa-2026"}, "salsa has salsa, salsa-2025, salsa-2024; found 'salsa-2026'"),
        ({"mirroring": "yes"}, "true or false"),
        ({"tile_step": "half"}, "tile_step is a number"),
        ({"tile_step": 0.0}, "above 0 and at most 1"),
        ({"engine": "fast"}, "own or compiled or reference"),
        ({"precision": "half"}, "precision must be"),
    ],
)
def test_options_that_cannot_be_used_are_refused(models_dir: Path, options: dict[str, object], words: str) -> None:
    liver = LabelVolume(np.ones((2, 2, 2), dtype=np.uint8), Grid((2, 2, 2), np.eye(4)))
    with pytest.raises(ConfigError, match=words):
        pipeline(models_dir, liver, **options)


def test_absent_weights_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="salsa-node models import"):
        load("salsa", PipelineSettings("cpu", tmp_path))
    with pytest.raises(ConfigError, match="the pipeline salsa has preset"):
        load("salsa", PipelineSettings("cpu", tmp_path, options={"presett": "salsa"}))


def test_it_is_a_pipeline(models_dir: Path) -> None:
    liver = LabelVolume(np.ones((2, 2, 2), dtype=np.uint8), Grid((2, 2, 2), np.eye(4)))
    assert isinstance(pipeline(models_dir, liver), Pipeline)

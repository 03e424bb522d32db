"""The bench of the whole node: our way runs as it is measured; of upstream's, what the networks are not needed for."""

from __future__ import annotations

import importlib.util
import io
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest

from salsa_node.config import load
from salsa_node.phantom import Recipe, make, write_study
from salsa_node.pipelines import PipelineSettings
from salsa_node.pipelines.given_masks import GivenMasksPipeline
from salsa_node.series import inspect, read_volume

BENCH = Path(__file__).parents[1] / "scripts" / "bench_node"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    loader = SourceFileLoader("bench_node", str(BENCH))
    spec = importlib.util.spec_from_loader("bench_node", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_our_way_is_measured_stage_by_stage(bench: ModuleType, tmp_path: Path) -> None:
    studies = bench.prepare(tmp_path, *bench.TINY, 1)
    told = bench.in_turn("ours", tmp_path, studies)
    (study,) = told["studies"]
    assert list(study["stages"]) == list(bench.STAGES)
    assert all(seconds >= 0 for seconds in study["stages"].values())
    assert sum(study["stages"].values()) == pytest.approx(study["total_s"], abs=0.1)
    assert study["stages"]["quiet"] >= bench.QUIET_S
    assert study["objects"] == len(list((tmp_path / "ours" / "pacs").iterdir())) > 1
    assert told["cpu_s"] > 0
    assert told["peak_mib"] > 300  # torch alone holds that much
    assert load(tmp_path / "ours" / "salsa_node.toml").pipeline.options == {"mirroring": False}


@pytest.mark.parametrize("mirroring", [False, True])
def test_upstream_mirrors_as_ours_is_told_to(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirroring: bool
) -> None:
    class SeenError(Exception):
        pass

    def seen(place: Path, folder: Path, **options: bool) -> None:
        assert place.parent == folder == tmp_path
        raise SeenError(options)

    monkeypatch.setattr(bench.chain, "upstream", seen)
    monkeypatch.setattr(bench, "to_nifti", lambda images, place: place / "scan.nii.gz")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"images": "images", "pacs_port": 1}) + "\n"))
    with pytest.raises(SeenError) as told:
        bench.carry_upstream(tmp_path, mirroring=mirroring)
    assert told.value.args == ({"mirroring": mirroring},)


def test_what_upstream_found_lies_on_the_slices_where_it_found_it(bench: ModuleType, tmp_path: Path) -> None:
    phantom = make(Recipe(50, (12, 40, 48), (9.0, 6.0, 5.0)))  # no two sides alike
    study = write_study(phantom, tmp_path / "study")
    images = tmp_path / "images"
    images.mkdir()
    for path in (*study.localizer, *study.axial):
        path.rename(images / f"{path.parent.name}-{path.name}")
    place = tmp_path / "place"
    place.mkdir()
    scan = bench.to_nifti(images, place)
    found = np.asarray(nibabel.load(scan).dataobj).transpose(2, 1, 0) > 150  # bones and vessels, at no one's centre
    seg = bench.write_seg(found.astype(np.uint8), scan, images, tmp_path / "seg.dcm")
    ct = read_volume(inspect(sorted(images.glob("axial-*"))))
    given = GivenMasksPipeline(PipelineSettings(masks_path=seg)).segment(ct).lesions.labels > 0
    assert given.sum() > 50
    np.testing.assert_array_equal(given, ct.voxels_hu > 150)


def test_the_table_sets_upstream_over_ours(bench: ModuleType) -> None:
    ways = {
        way: {
            "studies": [{"total_s": total_s, "stages": {"quiet": 2.0, "segment": total_s - 2}, "objects": objects}],
            "cpu_s": 10.0,
            "peak_mib": 1000,
        }
        for way, total_s, objects in (("upstream", 42.0, 1), ("ours", 10.0, 5))
    }
    told = bench.as_table({"shape": (1, 2, 3), "images": 7, "quiet_s": 2, "dice": 1.0, "ways": ways})
    assert told.splitlines()[0] == "1x2x3, 7 images; lesion Dice of the two SEGs: 1.0000"
    rows = {line[:22].strip(): line[22:].split() for line in told.splitlines()[2:]}
    assert rows["study 1, cold, s"] == ["42.00", "10.00", "4.20"]
    assert rows["without the quiet"] == ["40.00", "8.00", "5.00"]
    assert rows["assemble, s"] == ["-", "-", "-"]
    assert rows["objects sent"] == ["1.00", "5.00", "0.20"]

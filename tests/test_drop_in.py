"""A site drops its weights in: after the imports "auto" is SALSA's pipeline, in a batch that keeps what lies between.

The weights are the demo networks in SALSA's and TotalSegmentator's layouts; all else is what a site does.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from salsa_node import batch, cases, nifti, phantom, preflight
from salsa_node.config import Config
from salsa_node.criteria import Criteria, Rule
from salsa_node.errors import WeightsMissing
from salsa_node.limits import Limits
from salsa_node.model_import import import_model
from salsa_node.models import demo_models_dir
from salsa_node.pipelines import PipelineSettings, load
from salsa_node.pipelines.salsa_steps import OUTSIDE_HU
from salsa_node.settings import NodeSettings, PipelineChoice
from tests.made_totalseg import make_weights

NOW = datetime(2026, 11, 21, 8, tzinfo=UTC)
QUICK = {"preset": "salsa-2025", "mirroring": False, "tile_step": 1.0}
RECIPE = phantom.Recipe(43, (26, 46, 46), (5.0, 2.9, 2.9), "LSP", center_lps_mm=(-50.0, -5.0, 5.0))


def test_imported_weights_are_found_run_and_followed_from_stage_to_stage(tmp_path: Path) -> None:
    config = replace(
        Config(), node=NodeSettings(tmp_path / "data"), pipeline=PipelineChoice("auto", "cpu", options=QUICK)
    )
    assert preflight.settled(config).pipeline.name == "demo"
    given = shutil.copytree(demo_models_dir() / "salsa", tmp_path / "vhio" / "Dataset001_TALES")
    archive = shutil.make_archive(str(tmp_path / "weights"), "zip", given.parent, given.name)
    import_model(Path(archive), config.models_dir, NOW)
    assert preflight.settled(config).pipeline.name == "salsa"
    with pytest.raises(WeightsMissing, match="models fetch 298"):
        preflight.ready(config)
    for number in (291, 298):
        (folder,) = make_weights(tmp_path / f"downloads-{number}").glob(f"Dataset{number}_*")
        (manifest,) = import_model(folder, config.models_dir, NOW)
        assert manifest.card.commercial_use
    ready = preflight.ready(config)
    assert all(check.ok for check in preflight.checks(config))

    made = phantom.make(RECIPE)
    nifti.write_ct(made.ct, tmp_path / "scan.nii.gz")
    choice = ready.pipeline
    pipeline = load(choice.name, PipelineSettings(choice.device, ready.models_dir, options=choice.options))
    placed = cases.placed(cases.find([str(tmp_path / "scan.nii.gz")]), None)
    wanted = batch.Wanted(keep_intermediates=True)
    (result,) = batch.run(placed, pipeline, Criteria(Rule.VOLUME), Limits(), wanted)
    assert result.state == "done", result.told
    assert dict(result.record["pipeline"])["name"] == "salsa"  # type: ignore[call-overload]

    kept = tmp_path / "scan_SALSA"
    names = {path.relative_to(kept).as_posix().removesuffix(".nii.gz") for path in kept.rglob("*.nii.gz")}
    assert names == set(cases.INTERMEDIATES)
    scan, liver = (nib.load(path) for path in (tmp_path / "scan.nii.gz", kept / "liver.nii.gz"))
    assert np.array_equal(liver.affine, scan.affine)
    truth = made.liver.labels.transpose(2, 1, 0) == 1
    assert np.asarray(liver.dataobj)[truth].mean() > 0.5
    fine = nifti.read_ct(kept / "scan_resampled.nii.gz")
    seen = nifti.read_ct(kept / "cropped" / "scan_0000.nii.gz")
    found = nifti.read_labels(kept / "cropped" / "mask_0000.nii.gz")
    whole = nifti.read_labels(kept / "mask_resampled.nii.gz")
    assert found.grid.matches(seen.grid)
    assert whole.grid.matches(fine.grid)
    # Upstream gives the crop the uncropped affine: it then lies elsewhere in the patient. Ours lies where it was cut.
    first = tuple(round(n) for n in fine.grid.to_index(seen.grid.to_lps_mm((0, 0, 0))))
    assert any(first)
    box = tuple(slice(n, n + side) for n, side in zip(first, seen.grid.shape, strict=True))
    there = fine.voxels_hu[box]
    within = tuple(slice(0, side) for side in there.shape)
    inside = seen.voxels_hu[within] != OUTSIDE_HU
    assert inside.sum() > 10_000
    assert np.array_equal(seen.voxels_hu[within][inside], there[inside])
    assert np.array_equal(whole.labels[box] > 0, (found.labels[within] > 0) & inside)
    written = nifti.read_labels(result.place)
    assert (written.labels > 0).sum() > 0

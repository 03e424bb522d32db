"""SALSA's chain driven the upstream way: files between all steps, MONAI, nnU-Net's file API, nibabel.

Written from what radiomicsgroup/liver-SALSA does, with the libraries it does it with; the judge of our own chain. The
tests and scripts/bench_pipeline run it. A folder holds `scan.nii.gz` and `liver.nii.gz`; the rest is made there.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

STAGES = ("nnUNetTrainer__nnUNetPlans__3d_lowres", "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres")


def preprocess(folder: Path) -> dict[str, Any]:
    """1 mm, the liver cleaned, `in/scan_0000.nii.gz`; what the way back needs."""
    import cc3d
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd
    from scipy.ndimage import binary_closing, binary_dilation, generate_binary_structure

    keys = ["scan", "liver"]
    steps = [
        LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS"),
        Spacingd(keys, pixdim=(1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
    ]  # fmt: skip
    loaded = Compose(steps)({key: folder / f"{key}.nii.gz" for key in keys})
    scan, liver = (np.asarray(loaded[key][0]) for key in keys)
    affine = np.asarray(loaded["scan"].affine)
    ball = generate_binary_structure(3, 2)
    wide = binary_dilation(binary_closing(liver > 0, ball, iterations=10), ball, iterations=2)
    parts = cc3d.connected_components(wide, connectivity=6)
    largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    for name, volume in (("scan_resampled", scan), ("liver_postprocessed", largest.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")
    sides = [np.flatnonzero(largest.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(int(side[0]), int(side[-1]) + 1) for side in sides)
    seen = np.where(largest, scan, -1024)[box]
    padded = np.pad(seen, [(0, -n % 64) for n in seen.shape], constant_values=-1024)
    (folder / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(padded, affine), folder / "in" / "scan_0000.nii.gz")
    return {"affine": loaded["scan"].affine, "shape": scan.shape, "box": box, "seen": seen.shape}


def predict(folder: Path, models: Path, *, tile_step: float, mirroring: bool, pools: bool) -> None:
    """Both stages, each loaded from disk, by nnU-Net's file API; pools: with its two worker processes a step."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    before = None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        for stage, out in zip(STAGES, ("low", "high"), strict=True):
            (folder / out).mkdir()
            predictor = nnUNetPredictor(
                tile_step_size=tile_step,
                use_mirroring=mirroring,
                perform_everything_on_device=device.type == "cuda",
                device=device,
                allow_tqdm=False,
            )
            predictor.initialize_from_trained_model_folder(str(models / stage), (0,))
            run = predictor.predict_from_files if pools else predictor.predict_from_files_sequential
            more = {"num_processes_preprocessing": 2, "num_processes_segmentation_export": 2} if pools else {}
            run(str(folder / "in"), str(folder / out), folder_with_segs_from_prev_stage=before, **more)
            before = str(folder / out)


def restore(folder: Path, made: dict[str, Any]) -> np.ndarray:
    """Lesions as (slice, row, column) of the scan's array; 1 = lesion."""
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd
    from nibabel.processing import resample_from_to

    answer = np.asarray(nibabel.load(folder / "high" / "scan.nii.gz").dataobj)
    pasted = np.zeros(made["shape"], dtype=np.uint8)
    pasted[made["box"]] = answer[tuple(slice(n) for n in made["seen"])]
    nibabel.save(nibabel.Nifti1Image(pasted, np.asarray(made["affine"])), folder / "mask_resampled.nii.gz")
    source = nibabel.load(folder / "scan.nii.gz")
    keys = ["scan", "mask"]
    steps = [
        LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS"),
        Spacingd(["mask"], pixdim=source.header.get_zooms(), mode="nearest"),
    ]  # fmt: skip
    loaded = Compose(steps)({"scan": folder / "scan.nii.gz", "mask": folder / "mask_resampled.nii.gz"})
    coarse = nibabel.Nifti1Image(np.asarray(loaded["mask"][0]).astype(np.uint8), np.asarray(loaded["scan"].affine))
    back = resample_from_to(coarse, source)
    nibabel.save(back, folder / "scan_SALSA.nii.gz")
    return np.asarray(back.dataobj).transpose(2, 1, 0)

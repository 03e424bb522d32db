"""SALSA's chain as upstream drives it, with the demo's weights in its layouts: what two benches set beside ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
_TOTALSEGMENTATOR = (  # its command, where torchvision cannot be imported beside a CPU torch
    "from salsa_node.pipelines import nnunet\n"
    "nnunet._define_missing_torchvision_operators()\n"
    "from totalsegmentator.bin.TotalSegmentator import main\n"
    "main()\n"
)


def install_models(folder: Path) -> Path:
    """The demo's networks below `folder`/models, as TotalSegmentator's and as SALSA's; that folder."""
    from salsa_node.models import DEMO_STAGES, demo_models_dir

    models = folder / "models"
    _of_tests("made_totalseg").make_weights(models)
    for stage in ("lowres", "cascade"):
        source = demo_models_dir() / DEMO_STAGES[stage]
        shutil.copytree(source, models / "salsa" / source.name)
    (folder / "home").mkdir()
    settings = {
        "totalseg_id": "x",
        "send_usage_stats": False,
        "prediction_counter": 0,
        "statistics_disclaimer_shown": True,
    }
    (folder / "home" / "config.json").write_text(json.dumps(settings))
    return models


def upstream(place: Path, folder: Path, *, mirroring: bool = False) -> tuple[Any, dict[str, float]]:
    """`place`/scan.nii.gz through TotalSegmentator as a subprocess, MONAI, nnU-Net's file API and nibabel.

    folder: where `install_models` put the weights.
    The lesions as (slice, row, column) of the scan's array, and seconds by stage.
    """
    import torch

    upstream_salsa = _of_tests("upstream_salsa")
    environment = os.environ | {
        "TOTALSEG_WEIGHTS_PATH": str(folder / "models" / "totalsegmentator"),
        "TOTALSEG_HOME_DIR": str(folder / "home"),
    }
    device = "gpu" if torch.cuda.is_available() else "cpu"
    begun = time.perf_counter()
    command = ["-i", "scan.nii.gz", "-o", "ts", "--roi_subset", "liver", "--device", device, "--quiet"]
    subprocess.run(
        [sys.executable, "-c", _TOTALSEGMENTATOR, *command],
        cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.copyfile(place / "ts" / "liver.nii.gz", place / "liver.nii.gz")
    liver = time.perf_counter()
    made = upstream_salsa.preprocess(place)
    crop = time.perf_counter()
    upstream_salsa.predict(place, folder / "models" / "salsa", tile_step=0.5, mirroring=mirroring, pools=True)
    networks = time.perf_counter()
    lesions = upstream_salsa.restore(place, made)
    back = time.perf_counter()
    return lesions, {
        "liver": liver - begun,
        "1 mm and crop": crop - liver,
        "networks": networks - crop,
        "back": back - networks,
    }


@contextmanager
def watched(pid: int) -> Iterator[list[float]]:
    """MiB that a process and all below it hold at their largest; shared pages count once (proportional set size)."""
    import psutil

    peak, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.5):  # reading the maps of large processes is work by itself
            held = 0
            try:
                root = psutil.Process(pid)
                for one in (root, *root.children(recursive=True)):
                    held += one.memory_full_info().pss
            except psutil.Error:
                continue
            peak[0] = max(peak[0], held / 2**20)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _of_tests(name: str) -> Any:
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return import_module(name)

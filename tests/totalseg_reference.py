"""TotalSegmentator's own `python_api`, offline, in a process of its own: it changes nnU-Net's functions for good.

Usage: python totalseg_reference.py WEIGHTS HOME IMAGE OUT TASK...
A task is `liver` (of the task total, the liver alone), `liver_fast`, or one of TotalSegmentator's names, which is then
cropped by the 3 mm network.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from multiprocessing.context import BaseContext
from pathlib import Path


def refuse(*_: object) -> None:
    raise AssertionError("TotalSegmentator asked for the network")


SPAWNING = multiprocessing.get_context


def forking(_: str | None = None) -> BaseContext:
    return SPAWNING("fork")


def main(weights: str, home: str, image: str, out: str, *tasks: str) -> None:
    os.environ["TOTALSEG_WEIGHTS_PATH"] = weights
    os.environ["TOTALSEG_HOME_DIR"] = home
    settings = {"totalseg_id": "x", "send_usage_stats": False, "prediction_counter": 0}
    settings["statistics_disclaimer_shown"] = True
    (Path(home) / "config.json").write_text(json.dumps(settings))
    socket.getaddrinfo = refuse

    multiprocessing.get_context = forking  # a spawned one imports torch anew
    multiprocessing.cpu_count = lambda: 1  # and may fork: torch has no threads to lose

    import nibabel as nib
    from totalsegmentator.python_api import totalsegmentator

    from salsa_node.pipelines import nnunet

    nnunet._define_missing_torchvision_operators()  # its trainers are found by a walk that imports torchvision
    for task in tasks:
        asked: dict[str, object] = {"task": task, "robust_crop": True}
        if task in ("liver", "liver_fast"):
            asked = {"task": "total", "roi_subset": ["liver"], "fast": task == "liver_fast"}
        found = totalsegmentator(nib.load(image), None, ml=True, device="cpu", quiet=True, nr_thr_saving=1, **asked)
        nib.save(found, Path(out) / f"{task}.nii.gz")


if __name__ == "__main__":
    main(*sys.argv[1:])

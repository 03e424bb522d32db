"""The sliding window of nnU-Net v2: overlapping patches, weighted towards their centres, summed to logits.

The same patches in the same order with the same half-precision sums as `nnUNetPredictor`, so that labels are equal
bit for bit on a CPU (Isensee et al., Nature Methods 2021). Unlike it, an error is an error: nothing is retried here,
and the caller says where the network multiplies and where its answer is collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations, product

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from salsa_node.errors import PipelineError
from salsa_node.pipelines.device import Placement

Size = tuple[int, int, int]
Tile = tuple[slice, slice, slice, slice]

_CENTRE_WEIGHT = 10  # of a patch's middle; larger would overflow half precision, smaller lose its corners


def logits(
    module: torch.nn.Module,
    image: torch.Tensor,
    patch_size: Size,
    classes: int,
    placement: Placement,
    *,
    tile_step: float = 0.5,
    mirror_axes: Sequence[int] | None = None,
    bfloat16: bool = False,
) -> torch.Tensor:
    """(classes, slice, row, column) half-precision logits, on `placement.results`.

    module: on `placement.compute`. image: (channels, slice, row, column) float32, as the preprocessor leaves it.
    tile_step: how far patches lie apart, as a share of the patch. mirror_axes: 0, 1, 2 = slice, row, column: average
    over every flip along them. bfloat16: multiply in it on a CPU; a GPU always runs in float16 where that is safe.
    Raises PipelineError where the logits are not finite, and what torch raises where memory runs out.
    """
    short = [max(0, least - count) for least, count in zip(patch_size, image.shape[1:], strict=True)]
    below = [missing // 2 for missing in short]
    above = [missing - less for missing, less in zip(short, below, strict=True)]
    room = [side for pair in zip(reversed(below), reversed(above), strict=True) for side in pair]
    padded = torch.nn.functional.pad(image, room).to(placement.results)
    size = tuple(padded.shape[1:])
    weights = compute_gaussian(
        patch_size, sigma_scale=1 / 8, value_scaling_factor=_CENTRE_WEIGHT, device=placement.results
    )
    summed = torch.zeros((classes, *size), dtype=torch.half, device=placement.results)
    total = torch.zeros(size, dtype=torch.half, device=placement.results)
    with torch.inference_mode(), _precision(placement.compute, bfloat16):
        for tile in tiles((size[0], size[1], size[2]), patch_size, tile_step):
            patch = torch.clone(padded[tile][None], memory_format=torch.contiguous_format).to(placement.compute)
            answer = _mirrored(module, patch, mirror_axes)[0].to(placement.results)
            answer *= weights
            summed[tile] += answer
            total[tile[1:]] += weights
        torch.div(summed, total, out=summed)
    if not bool(torch.isfinite(summed).all()):
        raise PipelineError("the network answered with numbers that are not finite: damaged weights or damaged input")
    z, y, x = (slice(less, less + count) for less, count in zip(below, image.shape[1:], strict=True))
    return summed[:, z, y, x]


def tiles(size: Size, patch_size: Size, tile_step: float) -> Iterator[Tile]:
    """Where the patches lie, slice by slice; a size below the patch's is an error of the caller."""
    steps = compute_steps_for_sliding_window(size, patch_size, tile_step)
    for corner in product(*steps):
        z, y, x = (slice(start, start + length) for start, length in zip(corner, patch_size, strict=True))
        yield slice(None), z, y, x


def _mirrored(module: torch.nn.Module, patch: torch.Tensor, mirror_axes: Sequence[int] | None) -> torch.Tensor:
    answer: torch.Tensor = module(patch)
    if not mirror_axes:
        return answer
    axes = [axis + 2 for axis in mirror_axes]
    flips = [flip for count in range(len(axes)) for flip in combinations(axes, count + 1)]
    for flip in flips:
        answer += torch.flip(module(torch.flip(patch, flip)), flip)
    answer /= len(flips) + 1
    return answer


def _precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    if device.type == "cuda":
        return torch.autocast("cuda", enabled=True)
    return torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext()

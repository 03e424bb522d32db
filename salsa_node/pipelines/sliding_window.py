"""The sliding window of nnU-Net v2: overlapping patches, weighted towards their centres, summed to logits.

The same patches in the same order with the same half-precision sums as `nnUNetPredictor`, so that labels are equal
bit for bit on a CPU (Isensee et al., Nature Methods 2021). A GPU computes as many patches and mirrored passes together
as it has memory for. Unlike nnU-Net's, an error is an error: nothing is retried here, and the caller says where the
network multiplies and where its answer is collected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import combinations, product

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from salsa_node.errors import PipelineError
from salsa_node.pipelines.device import Placement, fit_together, measure_from_here, sent

Size = tuple[int, int, int]
Tile = tuple[slice, slice, slice, slice]

Flip = tuple[int, ...]  #: axes of (channels, slice, row, column) that a pass sees backwards

PATCHES_AT_ONCE = 16  #: at most, on a GPU; more fill it no better
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
    together: int | None = None,
) -> torch.Tensor:
    """(classes, slice, row, column) half-precision logits, on `placement.results`.

    module: on `placement.compute`. image: (channels, slice, row, column) float32, as the preprocessor leaves it.
    tile_step: how far patches lie apart, as a share of the patch. mirror_axes: 0, 1, 2 = slice, row, column: average
    over every flip along them. bfloat16: multiply in it on a CPU; a GPU always runs in float16 where that is safe.
    together: how many passes through the network are one batch; None: one on a CPU, on a GPU what fits beside what is
    there, judged by the first pass.
    Raises PipelineError where the logits are not finite, and what torch raises where memory runs out.
    """
    short = [max(0, least - count) for least, count in zip(patch_size, image.shape[1:], strict=True)]
    below = [missing // 2 for missing in short]
    above = [missing - less for missing, less in zip(short, below, strict=True)]
    room = [side for pair in zip(reversed(below), reversed(above), strict=True) for side in pair]
    padded = sent(torch.nn.functional.pad(image, room), placement.results)
    size = tuple(padded.shape[1:])
    weights = centre_weights(patch_size, placement.results)
    summed = torch.zeros((classes, *size), dtype=torch.half, device=placement.results)
    total = torch.zeros(size, dtype=torch.half, device=placement.results)
    flips = mirrorings(mirror_axes)
    spots = tiles((size[0], size[1], size[2]), patch_size, tile_step)
    mean = weights  # of the tile's flips so far
    with torch.inference_mode(), _precision(placement.compute, bfloat16):
        for tile, flip, answer in _answers(module, padded, spots, flips, placement.compute, together):
            one = _flipped(answer, flip)
            mean = one if flip == flips[0] else mean.add_(one)
            if flip != flips[-1]:
                continue
            if len(flips) > 1:
                mean /= len(flips)
            weighted = mean.to(placement.results)
            weighted *= weights
            summed[tile] += weighted
            total[tile[1:]] += weights
        torch.div(summed, total, out=summed)
    if not bool(torch.isfinite(summed).all()):
        raise PipelineError("the network answered with numbers that are not finite: damaged weights or damaged input")
    z, y, x = (slice(less, less + count) for less, count in zip(below, image.shape[1:], strict=True))
    return summed[:, z, y, x]


@lru_cache(maxsize=16)
def centre_weights(patch_size: Size, device: torch.device) -> torch.Tensor:
    """What each voxel of a patch counts, half precision, on `device`; not to be written into.

    nnU-Net keeps two of them: a chain of more networks would make them anew with every case, 0.6 s of a CPU for each.
    """
    weights: torch.Tensor = compute_gaussian(
        patch_size, sigma_scale=1 / 8, value_scaling_factor=_CENTRE_WEIGHT, device=device
    )
    return weights


def tiles(size: Size, patch_size: Size, tile_step: float) -> Iterator[Tile]:
    """Where the patches lie, slice by slice; a size below the patch's is an error of the caller."""
    steps = compute_steps_for_sliding_window(size, patch_size, tile_step)
    for corner in product(*steps):
        z, y, x = (slice(start, start + length) for start, length in zip(corner, patch_size, strict=True))
        yield slice(None), z, y, x


def _answers(
    module: torch.nn.Module,
    image: torch.Tensor,
    spots: Iterable[Tile],
    flips: Sequence[Flip],
    compute: torch.device,
    together: int | None,
) -> Iterator[tuple[Tile, Flip, torch.Tensor]]:
    """What the network answers to each flip of each tile, not yet flipped back; the caller may write into it.

    Patches in which every channel has one value throughout, such as those beside an organ that was cut out, get one
    answer: the same numbers in are the same numbers out.
    """
    blank: dict[tuple[float, ...], torch.Tensor] = {}
    at_once = together or 1
    held = measure_from_here(compute) if together is None else None
    looked_at = [(tile, _only_values(image[tile])) for tile in spots]
    waiting = deque((tile, flip, values) for tile, values in looked_at for flip in flips)
    while waiting:
        some: list[tuple[Tile, Flip, tuple[float, ...] | None]] = []
        wanted: list[torch.Tensor] = []
        meant: set[tuple[float, ...]] = set()
        while waiting:
            tile, flip, values = waiting[0]
            if values is None or not (values in blank or values in meant):
                if len(wanted) == at_once:
                    break
                wanted.append(_flipped(image[tile], flip))
                meant |= {values} if values is not None else set()
            some.append(waiting.popleft())
        found = iter(module(sent(torch.stack(wanted), compute)) if wanted else ())
        if held is not None:
            at_once, held = fit_together(compute, held, PATCHES_AT_ONCE), None
        for tile, flip, values in some:
            if values is None:
                yield tile, flip, next(found)
            else:
                if values not in blank:
                    blank[values] = next(found).clone()
                yield tile, flip, blank[values].clone()


def _only_values(patch: torch.Tensor) -> tuple[float, ...] | None:
    """The value of each channel where it is the same throughout, else None."""
    corner = patch[:, :1, :1, :1]
    return tuple(corner.flatten().tolist()) if bool((patch == corner).all()) else None


def mirrorings(mirror_axes: Sequence[int] | None) -> list[Flip]:
    """The flips of (channels, slice, row, column) to average over, the first of them none, in nnU-Net's order."""
    axes = [axis + 1 for axis in mirror_axes or ()]
    return [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]


def _flipped(patch: torch.Tensor, flip: Flip) -> torch.Tensor:
    return torch.flip(patch, flip) if flip else patch


def _precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    if device.type == "cuda":
        return torch.autocast("cuda", enabled=True)
    return torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext()

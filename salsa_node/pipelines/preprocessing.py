"""nnU-Net's preprocessing of an image that a network is to see, without what only training asks of it.

`DefaultPreprocessor.run_case_npy` fills the holes of a mask to find a box that has none of them, resamples a label map
that nobody reads, and draws samples of each class. What is left gives the same channels, to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bounds = list[list[int]]


def prepared(
    image: npt.NDArray[Any],
    stage: npt.NDArray[np.int16] | None,
    spacing_mm: list[float],
    predictor: Any,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.integer[Any]] | None, dict[str, Any]]:
    """Channels (channel, z, y, x) at the network's spacing, the previous stage there, and the way back.

    image: (1, z, y, x), numbers of any kind. stage: (1, z, y, x) labels of a cascade's previous stage, or None.
    predictor: nnU-Net's, which holds plans, configuration and data set. The way back is nnU-Net's `properties`.
    """
    from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    bounds = bounds_of_what_is_not_zero(image)
    if type(preprocessor) is not DefaultPreprocessor or any(configuration.use_mask_for_norm) or not bounds:
        channels, labels, properties = preprocessor.run_case_npy(
            image, stage, {"spacing": list(spacing_mm)}, plans, configuration, predictor.dataset_json
        )
        return channels, None if stage is None else labels, properties
    forward = list(plans.transpose_forward)
    axes = [0, *(axis + 1 for axis in forward)]
    bounds = [bounds[axis] for axis in forward]
    box = (slice(None), *(slice(*side) for side in bounds))
    spacing = [spacing_mm[axis] for axis in forward]
    turned = image.transpose(axes)
    channels = turned[box].astype(np.float32)
    properties = {
        "spacing": list(spacing_mm),
        "shape_before_cropping": turned.shape[1:],
        "bbox_used_for_cropping": bounds,
        "shape_after_cropping_and_before_resampling": channels.shape[1:],
    }
    shape = compute_new_shape(channels.shape[1:], spacing, configuration.spacing)
    channels = preprocessor._normalize(
        channels, [None], configuration, plans.foreground_intensity_properties_per_channel
    )
    channels = configuration.resampling_fn_data(channels, shape, spacing, configuration.spacing)
    if stage is None:
        return channels, None, properties
    labels = stage.transpose(axes)[box].copy()
    if tuple(shape) != labels.shape[1:]:  # between two voxels it counts what the third is
        labels[(labels == 0) & ~create_nonzero_mask(turned)[box[1:]][None]] = -1
        labels = configuration.resampling_fn_seg(labels, shape, spacing, configuration.spacing)
    return channels, labels, properties


def bounds_of_what_is_not_zero(image: npt.NDArray[Any]) -> Bounds:
    """Along z, y and x of (channel, z, y, x) the first index that holds something beside 0, and that behind the last.

    Empty where all is 0.
    """
    found = []
    for axis in range(1, image.ndim):
        planes = np.moveaxis(image, axis, 0)
        first = next((n for n in range(len(planes)) if planes[n].any()), None)
        if first is None:
            return []
        last = next(n for n in reversed(range(len(planes))) if planes[n].any())
        found.append([first, last + 1])
    return found

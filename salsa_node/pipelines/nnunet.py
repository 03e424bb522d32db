"""One trained nnU-Net v2 network: a CT volume in, labels on the same grid out, all in memory.

The only room that knows nnU-Net. It builds the network from the plans and reads the weights as plain tensors,
so that no code of a model folder is ever run and no trainer is searched for. nnU-Net's convention, channel first
and (z, y, x), is met here: every volume is turned to one orientation first, whatever way it was stored.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from salsa_node.errors import ConfigError, DeviceExhausted, PipelineError
from salsa_node.models import ModelFolder
from salsa_node.pipelines import Flag, preprocessing, resampling, sliding_window
from salsa_node.pipelines import plans as plans_file
from salsa_node.pipelines.device import (
    Placement,
    cpu_has_bfloat16,
    is_exhaustion,
    placements,
    release,
    use_no_more_than_cores,
)
from salsa_node.pipelines.resampling import Interpolation, OnDevice
from salsa_node.volume import CtVolume, Grid, LabelVolume

log = logging.getLogger(__name__)
#: who slides the window: `sliding_window`, the same with a network that torch compiled, or nnU-Net's predictor
ENGINES: Final = ("own", "compiled", "reference")
#: what nnU-Net and torch raise over plans and weights that do not fit together, as fuzzing found
MISFITS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_Voxel = TypeVar("_Voxel", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Turn:
    """How an array is turned so that its axes run to the head, the front and the right (S, A, R).

    That is a NIfTI in RAS as nnU-Net reads it: (z, y, x). On an oblique grid each axis goes to the nearest
    direction, so nothing is interpolated.

    order: the source axis that becomes slice, row and column. flipped: the turned axes that run backwards.
    """

    order: tuple[int, int, int]
    flipped: tuple[int, ...]

    @classmethod
    def of(cls, grid: Grid) -> Turn:
        """The turn that suits this grid."""
        cosines = grid.affine_lps_mm[:3, :3] / np.array(grid.spacing_mm)
        wanted = np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]]) @ cosines  # (wanted axis, source axis)
        best = max(permutations(range(3)), key=lambda order: sum(abs(wanted[n, axis]) for n, axis in enumerate(order)))
        flipped = tuple(n for n, axis in enumerate(best) if wanted[n, axis] < 0)
        return cls((best[0], best[1], best[2]), flipped)

    def apply(self, array: npt.NDArray[_Voxel]) -> npt.NDArray[_Voxel]:
        """The turned array, a view."""
        return np.flip(array.transpose(self.order), self.flipped)

    def undo(self, array: npt.NDArray[_Voxel]) -> npt.NDArray[_Voxel]:
        """The array as it was stored, a view."""
        back = np.argsort(self.order)
        return np.flip(array, self.flipped).transpose(*back)


class Network:
    """A trained configuration of nnU-Net v2, in memory.

    device: see `choose_device`. mirroring: average over flips where the checkpoint allows it; slower.
    tile_step: overlap of the sliding window, as a share of the patch.
    precision: "auto" takes bfloat16 on CPUs that have it; "float32" never. A GPU always runs mixed precision.
    engine: one of `ENGINES`. "compiled" needs a C++ compiler here and up to half a minute for its first patch;
    its logits differ by some 1e-5. "reference", nnU-Net's own predictor and resampling, is slower; its labels are
    those of "own", but where two classes score alike to the last digit.

    On a GPU cuDNN's `benchmark`, which nnU-Net switches on for the whole process, stays as it was: off, unless somebody
    else wants it, so that each run of a case multiplies by the same algorithms.

    Raises WeightsMissing where the folder is incomplete, PipelineError where it cannot be used, DeviceExhausted where
    the device has no memory for it.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device,
        *,
        mirroring: bool = False,
        tile_step: float = 0.5,
        precision: str = "auto",
        engine: str = "own",
    ) -> None:
        if engine not in ENGINES:
            raise ConfigError(f"engine is {' or '.join(ENGINES)}; found {engine!r}")
        if engine == "compiled" and device.type == "cpu" and not _has_compiler():
            raise ConfigError('engine = "compiled" needs a C++ compiler; install g++, or set engine = "own"')
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision must be auto, float32 or bfloat16; found {precision!r}")
        if not 0 < tile_step <= 1:
            raise ConfigError(f"tile_step is a share of the patch, above 0 and at most 1; found {tile_step}")
        wants_bfloat16 = precision == "bfloat16" or (precision == "auto" and cpu_has_bfloat16())
        self.bfloat16 = device.type == "cpu" and wants_bfloat16
        self.folder = folder
        self.device = device
        self.flags: tuple[Flag, ...] = ()  #: what went otherwise than asked in the last prediction
        self.ran_on = ""  #: where the last prediction was computed, in words
        self.forget()
        self._engine = engine
        self._compiled: torch.nn.Module | None = None
        use_no_more_than_cores()
        with _quiet():
            _define_missing_torchvision_operators()
            try:
                self._built: Any = _build_predictor(folder, device, mirroring, tile_step)
                if engine != "reference":
                    ours = OnDevice(self._built.configuration_manager, device)
                    self._built.configuration_manager = ours
            except (MemoryError, RuntimeError) as exc:
                if not is_exhaustion(exc):
                    raise
                release(device)
                raise DeviceExhausted(
                    f"{device} ran out of memory for the weights of {folder.path.name}: {exc}"
                ) from exc
        log.info("network loaded", extra={"event": "network.loaded", "folder": folder.path.name, "device": str(device)})

    @property
    def _predictor(self) -> Any:
        if self._built is None:
            raise PipelineError(f"{self.folder.path.name} was unloaded; load the pipeline again")
        return self._built

    @property
    def is_cascade(self) -> bool:
        """Whether it needs the labels of a previous stage."""
        return self._predictor.configuration_manager.previous_stage_name is not None

    @property
    def module(self) -> torch.nn.Module:
        """The network itself: channels of normalised patches in, logits out."""
        module: torch.nn.Module = self._predictor.network
        return module

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """What the network sees at once, in its own voxels (slice, row, column)."""
        size = self._predictor.configuration_manager.patch_size
        return int(size[0]), int(size[1]), int(size[2])

    @property
    def precision(self) -> str:
        """In what numbers it multiplies, in a word."""
        return "bfloat16" if self.bfloat16 else "mixed" if self.device.type == "cuda" else "float32"

    def unload(self) -> None:
        """Let go of the weights and of the device's memory; a prediction afterwards raises PipelineError."""
        if self._built is not None:
            self._built = self._compiled = None
            gc.collect()  # nnU-Net's predictor and its plans hold one another
            release(self.device)
            log.info("network unloaded", extra={"event": "network.unloaded", "folder": self.folder.path.name})

    def forget(self) -> None:
        """Let `flags` and `ran_on` say nothing of the last prediction, for a case that needs none."""
        self.flags = ()
        self.ran_on = str(self.device)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """The size of its own voxels (slice, row, column)."""
        mm = self._predictor.configuration_manager.spacing
        return float(mm[0]), float(mm[1]), float(mm[2])

    def predict(self, ct: CtVolume, previous: LabelVolume | None = None) -> LabelVolume:
        """Labels on `ct.grid`.

        previous: for a cascade, what the stage before found, on the same grid.
        Where a GPU's memory runs out the window is slid again with less of it, in the end on the CPU; `flags` then
        says so. Raises DeviceExhausted where no memory is left at all.
        """
        if self.is_cascade != (previous is not None):
            raise PipelineError(f"{self.folder.path.name}: a previous stage is needed by a cascade and by nothing else")
        if previous is not None and not previous.grid.matches(ct.grid):
            raise PipelineError(f"{self.folder.path.name}: the previous stage lies on another grid than the CT")
        turn = Turn.of(ct.grid)
        image = turn.apply(ct.voxels_hu)[None]
        stage = (
            None if previous is None else turn.apply(previous.labels)[None].astype(np.int16)
        )  # nnU-Net writes -1 into it
        spacing_mm = [ct.grid.spacing_mm[axis] for axis in turn.order]
        try:
            with _quiet():
                found = self.predict_array(image, spacing_mm, stage)
        except (MemoryError, RuntimeError) as exc:
            if is_exhaustion(exc):
                raise DeviceExhausted(f"{self.device} ran out of memory on a volume of {ct.grid.shape}: {exc}") from exc
            raise
        return LabelVolume(np.ascontiguousarray(turn.undo(found)), ct.grid)

    def preprocess(
        self, image: npt.NDArray[Any], stage: npt.NDArray[np.int16] | None, spacing_mm: list[float]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8], dict[str, Any]]:
        """What nnU-Net makes of (1, z, y, x) arrays for training: channels and labels at its spacing, and the way back.

        image: numbers of any kind; nnU-Net makes its own float32 of them. stage: the truth. For a prediction
        `preprocessing` makes the same channels.
        """
        predictor = self._predictor
        properties: dict[str, Any] = {"spacing": list(spacing_mm)}
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        channels, labels, properties = preprocessor.run_case_npy(
            image, stage, properties, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        return channels, labels, properties

    def predict_array(
        self, image: npt.NDArray[Any], spacing_mm: list[float], stage: npt.NDArray[np.int16] | None = None
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Labels (z, y, x) of a (1, z, y, x) image in nnU-Net's own order, as `predict` has them otherwise."""
        from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

        channels, labels, properties = preprocessing.prepared(image, stage, spacing_mm, self._predictor)
        if labels is not None:
            classes = self._predictor.label_manager.foreground_labels
            channels = np.vstack((channels, convert_labelmap_to_one_hot(labels[0], classes, channels.dtype)))
        logits = self.logits(torch.from_numpy(np.ascontiguousarray(channels, dtype=np.float32)))
        return self._labels(logits, properties)

    def _labels(self, logits: torch.Tensor, properties: dict[str, Any]) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Labels (z, y, x) of the image that was preprocessed, as nnU-Net's export finds them, class by class.

        nnU-Net itself resamples all classes before it looks for the highest: 10 GiB on 1,200 slices.
        """
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        predictor = self._predictor
        plans, configuration = predictor.plans_manager, predictor.configuration_manager
        if predictor.label_manager.has_regions:
            of_regions: npt.NDArray[np.unsignedinteger[Any]]
            of_regions = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.float().cpu(), plans, configuration, predictor.label_manager, properties,
                num_threads_torch=torch.get_num_threads(),
            )  # fmt: skip
            return of_regions
        shape = properties["shape_after_cropping_and_before_resampling"]
        spacing_mm = [properties["spacing"][axis] for axis in plans.transpose_forward]
        dtype = np.uint8 if len(logits) < 256 else np.uint16
        found: npt.NDArray[np.unsignedinteger[Any]] = np.zeros(properties["shape_before_cropping"], dtype=dtype)
        inside = found[tuple(slice(*side) for side in properties["bbox_used_for_cropping"])]
        if tuple(logits.shape[1:]) == tuple(shape):  # nothing is to be resampled: the device looks for the highest
            for at in range(shape[0]):
                inside[at] = logits[:, at].max(0).indices.to(torch.int32).cpu().numpy()
            return found.transpose(plans.transpose_backward)
        how = Interpolation.of(configuration.configuration, "probabilities", configuration.spacing, spacing_mm)
        if how is not None and self._engine != "reference":
            resampling.fill(inside, logits, how)
            return found.transpose(plans.transpose_backward)
        highest = np.full(shape, -np.inf, dtype=np.float32)
        for label, coarse in enumerate(logits):
            one = coarse[None].float().cpu()
            resampled = configuration.resampling_fn_probabilities(one, shape, configuration.spacing, spacing_mm)
            fine = np.asarray(resampled)[0]
            higher = fine > highest
            inside[higher] = label
            np.copyto(highest, fine, where=higher)
        return found.transpose(plans.transpose_backward)

    def logits(self, channels: torch.Tensor) -> torch.Tensor:
        """(classes, z, y, x) of (channels, z, y, x) as `preprocess` leaves them, in half precision."""
        self.forget()
        if self._engine == "reference":
            return self._by_nnunet(channels)
        *roomy, last = placements(self.device)
        for placement in roomy:
            try:
                return self._slide(channels, placement)
            except (MemoryError, RuntimeError) as exc:
                if not is_exhaustion(exc):
                    raise
            self._tell_step_down()
            release(self.device)
        try:
            return self._slide(channels, last)
        finally:
            self._move_back()

    def _by_nnunet(self, channels: torch.Tensor) -> torch.Tensor:
        """By nnU-Net's own predictor, which slides a second time, with results off the GPU, where the first fails."""
        predictor = self._predictor
        slide, tries = predictor._internal_predict_sliding_window_return_logits, 0

        def counted(*arguments: Any) -> torch.Tensor:
            nonlocal tries
            tries += 1
            answer: torch.Tensor = slide(*arguments)
            return answer

        predictor._internal_predict_sliding_window_return_logits = counted
        try:
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
                answer: torch.Tensor = predictor.predict_sliding_window_return_logits(channels)
        finally:
            predictor._internal_predict_sliding_window_return_logits = slide
        self.ran_on = str(Placement(self.device, answer.device))
        if tries > 1:
            self._tell_step_down()
        return answer

    def _tell_step_down(self) -> None:
        text = f"The memory of {self.device} ran out; the network's window was slid again with less of it."
        self.flags = (Flag("device_exhausted", text),)
        log.warning(text, extra={"event": "network.stepped_down", "folder": self.folder.path.name})

    def _move_back(self) -> None:
        """After the CPU has helped out; where the device is still full, the next prediction tries again."""
        try:
            self._predictor.network.to(self.device)
        except (MemoryError, RuntimeError) as exc:
            if not is_exhaustion(exc):
                raise
            log.warning(
                f"{self.device} has no room for the network yet",
                extra={"event": "network.kept_off", "folder": self.folder.path.name},
            )

    def _slide(self, channels: torch.Tensor, placement: Placement) -> torch.Tensor:
        predictor = self._predictor
        self.ran_on = str(placement)
        network: torch.nn.Module = predictor.network.to(placement.compute)
        slide = partial(
            sliding_window.logits,
            image=channels,
            patch_size=self.patch_size,
            classes=predictor.label_manager.num_segmentation_heads,
            placement=placement,
            tile_step=predictor.tile_step_size,
            mirror_axes=predictor.allowed_mirroring_axes if predictor.use_mirroring else None,
            bfloat16=self.bfloat16,
        )
        if self._engine != "compiled":
            return slide(network)
        from torch._dynamo.exc import TorchDynamoException  # a second of imports

        if self._compiled is None:
            self._compiled = cast(torch.nn.Module, torch.compile(network, dynamic=False))
        try:
            return slide(self._compiled)
        except TorchDynamoException as exc:
            raise PipelineError(
                f"{self.folder.path.name}: torch could not compile the network ({type(exc).__name__}); "
                'set engine = "own" in [pipeline.options]'
            ) from exc


def _has_compiler() -> bool:
    """Whether torch finds a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def _build_predictor(folder: ModelFolder, device: torch.device, mirroring: bool, tile_step: float) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    checkpoint = _read_checkpoint(folder.checkpoint)
    dataset = folder.dataset
    try:
        plans = PlansManager(folder.plans)
        configuration = plans.get_configuration(checkpoint["init_args"]["configuration"])
        plans_file.check(plans.plans, configuration.configuration, folder.path.name)
        if len(configuration.patch_size) != 3:
            raise PipelineError(f"{folder.path.name} is a {len(configuration.patch_size)}-D network; 3-D is expected")
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            determine_num_input_channels(plans, configuration, dataset),
            plans.get_label_manager(dataset).num_segmentation_heads,
            allow_init=False,
            deep_supervision=False,
        )
        network.load_state_dict(checkpoint["network_weights"])
    except MISFITS as exc:
        if isinstance(exc, RuntimeError) and is_exhaustion(exc):
            raise
        raise PipelineError(f"{folder.path.name}: plans and weights do not fit together ({exc})") from exc
    network.eval()
    benchmarks = torch.backends.cudnn.benchmark
    predictor = nnUNetPredictor(
        tile_step_size=tile_step,
        use_mirroring=mirroring,
        perform_everything_on_device=device.type != "cpu",
        device=device,
        allow_tqdm=False,
    )
    torch.backends.cudnn.benchmark = benchmarks
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    trainer = checkpoint.get("trainer_name", "nnUNetTrainer")
    predictor.manual_initialization(network, plans, configuration, None, dataset, trainer, axes)
    predictor.network = network.to(device)  # as it is: what is compiled is said by `engine`, not by nnUNet_compile
    _use_all_threads(predictor.configuration_manager.configuration)
    return predictor


def _read_checkpoint(file: Path) -> dict[str, Any]:
    """The tensors and plain values of a checkpoint. Raises PipelineError where it holds anything that could run."""
    # numpy's scalars are in the training log that nnU-Net keeps beside the weights, under its old name and its new.
    scalar: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [np.dtype]
    allowed += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    allowed += [(scalar, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as exc:
        if isinstance(exc, RuntimeError) and is_exhaustion(exc):
            raise
        raise PipelineError(
            f"{file.parent.parent.name}/{file.parent.name}/{file.name} cannot be read as plain tensors "
            f"({_unread(exc)}); a checkpoint that carries code, or is damaged, is refused"
        ) from exc
    if not isinstance(found, dict) or not {"network_weights", "init_args"} <= found.keys():
        raise PipelineError(f"{file.name} is no nnU-Net v2 checkpoint: network_weights and init_args were expected")
    return found


def _unread(exc: Exception) -> str:
    """Why a checkpoint was not read, without torch's advice to run it all the same."""
    named = re.search(r"GLOBAL ([\w.]+)", str(exc))
    return f"it asks for {named[1][:80]}" if named else f"cut off, or not of torch.save: {type(exc).__name__}"


def _use_all_threads(configuration: dict[str, Any]) -> None:
    """nnU-Net's torch resampling takes 4 threads whatever the machine has; this gives it torch's own count."""
    for kind in ("data", "seg", "probabilities"):
        if configuration.get(f"resampling_fn_{kind}") == "resample_torch_fornnunet":
            configuration[f"resampling_fn_{kind}_kwargs"]["num_threads"] = torch.get_num_threads()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """nnU-Net prints, and warns of plans in its old format, which it reads well; a node does neither."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected old nnU-Net plans format")
        yield


_torchvision_operators: list[torch.library.Library] = []


def _define_missing_torchvision_operators() -> None:
    """Lets `import torchvision` succeed beside a CPU-only torch.

    PyPI's torchvision is built for CUDA. Beside a CPU torch its operators cannot be loaded, and the import
    fails on the two that it registers without asking (nms, qnms). Networks from timm need that import.
    """
    spec = importlib.util.find_spec("torchvision")
    if _torchvision_operators or spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))  # type: ignore[no-untyped-call]
    except OSError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _torchvision_operators.append(library)

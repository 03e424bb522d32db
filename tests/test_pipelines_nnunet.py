"""The nnU-Net adapter: the same labels as nnU-Net's own loader, any orientation, and no code from model folders."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import pydoc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from salsa_node.errors import ConfigError, DeviceExhausted, PipelineError
from salsa_node.models import CHECKPOINT, ModelFolder, demo_models_dir
from salsa_node.models import DEMO_STAGES as STAGES
from salsa_node.phantom import Phantom, Recipe, make
from salsa_node.pipelines import device, nnunet, sliding_window
from salsa_node.pipelines.device import (
    Placement,
    choose_device,
    fit_together,
    is_exhaustion,
    measure_from_here,
    placements,
    sent,
)
from salsa_node.pipelines.nnunet import Network, Turn
from salsa_node.volume import CtVolume, Grid, LabelVolume

CPU = torch.device("cpu")
RECIPE = Recipe(11, (32, 48, 48), (6.0, 6.0, 6.0))


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make(RECIPE)


@pytest.fixture
def liver_copy(tmp_path: Path) -> Path:
    return shutil.copytree(demo_models_dir() / STAGES["liver"], tmp_path / "liver")


def network(stage: str) -> Network:
    return Network(ModelFolder(demo_models_dir() / STAGES[stage]), CPU, precision="float32")


@pytest.mark.parametrize("orientation", ["SPL", "IPL", "LSP", "AIR", "SAR", "PRI"])
@pytest.mark.parametrize("rotation", [(0.0, 0.0, 0.0), (25.0, -10.0, 15.0)])
def test_a_turned_array_runs_to_the_head_the_front_and_the_right(
    orientation: str, rotation: tuple[float, float, float]
) -> None:
    grid = replace(RECIPE, shape=(4, 5, 6), orientation=orientation, rotation_deg=rotation).grid
    indices = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    points = indices @ grid.affine_lps_mm[:3, :3].T + grid.affine_lps_mm[:3, 3]
    turn = Turn.of(grid)
    x, y, z = (turn.apply(np.ascontiguousarray(points[..., axis])) for axis in range(3))
    assert (np.diff(z, axis=0) > 0).all()
    assert (np.diff(y, axis=1) < 0).all()
    assert (np.diff(x, axis=2) < 0).all()
    assert np.array_equal(turn.undo(turn.apply(indices[..., 0])), indices[..., 0])


def by_nnunet_itself(stage: str, ct: CtVolume, previous: LabelVolume | None) -> np.ndarray:
    """nnU-Net's own way from a model folder to labels, turned by hand: "SPL" arrays become "SAR" ones."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(
            use_mirroring=False, perform_everything_on_device=False, device=CPU, allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(demo_models_dir() / STAGES[stage]), (0,))
        image = ct.voxels_hu[None, :, ::-1, ::-1].astype(np.float32)
        stage_before = None if previous is None else previous.labels[None, :, ::-1, ::-1].astype(np.int16)
        labels: np.ndarray = predictor.predict_single_npy_array(
            image, {"spacing": list(ct.grid.spacing_mm)}, stage_before, None, False
        )
    return labels[:, ::-1, ::-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_labels_are_those_of_nnunets_own_loader(phantom: Phantom) -> None:
    ours = network("liver").predict(phantom.ct).labels
    assert ours.sum() > 1000
    assert np.array_equal(ours, by_nnunet_itself("liver", phantom.ct, None))
    part = (slice(14, 22), slice(18, 28), slice(10, 20))  # some liver: the cascade's voxels are small
    grid = Grid((8, 10, 10), np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]] * (6.0, 6.0, 6.0, 1.0))
    crop = CtVolume(phantom.ct.voxels_hu[part], grid)
    previous = LabelVolume((crop.voxels_hu < 90).astype(np.uint8), grid)
    cascade = network("cascade").predict(crop, previous).labels
    assert 0 < cascade.sum() < cascade.size
    assert np.array_equal(cascade, by_nnunet_itself("cascade", crop, previous))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        ("IPL", lambda array: array[::-1]),
        ("SAR", lambda array: array[:, ::-1, ::-1]),
        ("LSP", lambda array: array.transpose(2, 0, 1)),
    ],
)
def test_the_way_a_volume_is_stored_changes_nothing(
    phantom: Phantom, orientation: str, turned: Callable[[np.ndarray], np.ndarray]
) -> None:
    axial = network("liver").predict(phantom.ct).labels
    stored = np.ascontiguousarray(turned(phantom.ct.voxels_hu))
    grid = replace(RECIPE, orientation=orientation, shape=stored.shape).grid  # type: ignore[arg-type]
    found = network("liver").predict(CtVolume(stored, grid))
    assert found.grid is grid
    assert np.array_equal(found.labels, turned(axial))


def test_the_spacing_is_turned_as_the_voxels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sagittal series: its slices lie along the axis that is a column of what nnU-Net sees."""
    affine = np.array([[2.0, 0, 0, 0], [0, 0, 0.7, 0], [0, -1.5, 0, 0], [0, 0, 0, 1]])
    grid = Grid((4, 6, 8), affine)
    assert grid.spacing_mm == (2.0, 1.5, 0.7)
    lowres, seen = network("lowres"), []

    def noted(_: Network, image: Any, spacing_mm: list[float], __: Any) -> Any:
        seen.append((image.shape, spacing_mm))
        return np.zeros(image.shape[1:], dtype=np.uint8)

    monkeypatch.setattr(Network, "predict_array", noted)
    assert lowres.predict(CtVolume(np.zeros(grid.shape, dtype=np.int16), grid)).labels.shape == grid.shape
    assert seen == [((1, 6, 8, 4), [1.5, 0.7, 2.0])]


def test_a_cascade_needs_the_stage_before_and_nothing_else_takes_one(phantom: Phantom) -> None:
    with pytest.raises(PipelineError, match="a previous stage is needed by a cascade"):
        network("cascade").predict(phantom.ct)
    with pytest.raises(PipelineError, match="a previous stage is needed by a cascade"):
        network("liver").predict(phantom.ct, phantom.liver)
    other = replace(RECIPE, center_lps_mm=(0.0, 0.0, 3.0)).grid
    with pytest.raises(PipelineError, match="lies on another grid"):
        network("cascade").predict(phantom.ct, LabelVolume(phantom.liver.labels, other))


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_is_not_run(liver_copy: Path, tmp_path: Path) -> None:
    file = liver_copy / "fold_0" / CHECKPOINT
    torch.save(torch.load(file, weights_only=True) | {"logging": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(PipelineError, match="carries code, or is damaged, is refused"):
        Network(ModelFolder(liver_copy), CPU)
    assert not (tmp_path / "sprung").exists()
    with contextlib.suppress(FileExistsError):
        torch.load(file, weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap was a real one


def test_a_damaged_checkpoint_is_refused(liver_copy: Path) -> None:
    file = liver_copy / "fold_0" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(PipelineError, match="carries code, or is damaged, is refused"):
        Network(ModelFolder(liver_copy), CPU)


def test_numbers_of_numpy_beside_the_weights_are_accepted(liver_copy: Path) -> None:
    file = liver_copy / "fold_0" / CHECKPOINT
    torch.save(torch.load(file, weights_only=True) | {"_best_ema": np.float64(0.9), "logging": [np.float32(1)]}, file)
    Network(ModelFolder(liver_copy), CPU)


def test_a_checkpoint_of_something_else_is_refused(liver_copy: Path) -> None:
    torch.save({"state_dict": {}}, liver_copy / "fold_0" / CHECKPOINT)
    with pytest.raises(PipelineError, match="no nnU-Net v2 checkpoint"):
        Network(ModelFolder(liver_copy), CPU)


def test_plans_that_name_foreign_code_or_other_weights_are_refused(liver_copy: Path) -> None:
    plans = json.loads((liver_copy / "plans.json").read_text())
    design = plans["configurations"]["3d_fullres"]["architecture"]
    design["network_class_name"] = "subprocess.Popen"
    (liver_copy / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(PipelineError, match=r"asks for the network subprocess\.Popen"):
        Network(ModelFolder(liver_copy), CPU)
    design["network_class_name"] = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    design["arch_kwargs"]["features_per_stage"][0] = 24
    (liver_copy / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(PipelineError, match="plans and weights do not fit together"):
        Network(ModelFolder(liver_copy), CPU)


@pytest.fixture
def exhausting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], None]:
    """Lets the sliding window of three placements fail so many times before it works."""

    def exhausted(error: Exception, times: int) -> None:
        slide, calls = sliding_window.logits, iter(range(99))

        def fail_first(*arguments: Any, **settings: Any) -> torch.Tensor:
            if next(calls) < times:
                raise error
            return slide(*arguments, **settings)

        monkeypatch.setattr(sliding_window, "logits", fail_first)
        monkeypatch.setattr(nnunet, "placements", lambda device: (Placement(device, device),) * 3)

    return exhausted


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("x"), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_exhausted_memory_is_a_retryable_error(
    phantom: Phantom, exhausting: Callable[[Exception, int], None], error: Exception
) -> None:
    liver = network("liver")
    exhausting(error, 3)
    with pytest.raises(DeviceExhausted, match="cpu ran out of memory on a volume of") as caught:
        liver.predict(phantom.ct)
    assert caught.value.retryable


@pytest.mark.parametrize("times", [1, 2])
def test_exhausted_memory_steps_down_once_and_says_so(
    phantom: Phantom,
    exhausting: Callable[[Exception, int], None],
    times: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    liver = network("liver")
    roomy = liver.predict(phantom.ct)
    assert liver.flags == ()
    exhausting(OUT_OF_MEMORY[0], times)
    tight = liver.predict(phantom.ct)
    assert np.array_equal(tight.labels, roomy.labels)
    assert [flag.name for flag in liver.flags] == ["device_exhausted"]
    assert not liver.flags[0].blocks
    assert caplog.text.count("memory of cpu ran out") == times
    liver.predict(phantom.ct)
    assert liver.flags == ()


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_that_ran_out_is_known_by_its_words(words: str) -> None:
    assert is_exhaustion(RuntimeError(words))
    assert not is_exhaustion(RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"))


GPU = torch.device("cuda", 1)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Network, list[torch.device], list[torch.device]]:
    """A network that believes it lies on a GPU, where its module was sent, and which devices were emptied."""
    sent: list[torch.device] = []
    emptied: list[torch.device] = []
    monkeypatch.setattr(nnunet, "release", emptied.append)
    liver = network("liver")
    liver.device = GPU
    monkeypatch.setattr(liver.module, "to", lambda device: sent.append(device) or liver.module)
    return liver, sent, emptied


@pytest.mark.parametrize(
    ("times", "sent_to", "ran_on"),
    [
        (0, [GPU], "cuda:1"),
        (1, [GPU, GPU], "cuda:1 with results on cpu"),
        (2, [GPU, GPU, CPU, GPU], "cpu"),
    ],
)
def test_what_did_not_fit_is_emptied_and_the_network_comes_back(
    on_a_gpu: tuple[Network, list[torch.device], list[torch.device]],
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    sent_to: list[torch.device],
    ran_on: str,
) -> None:
    liver, sent, emptied = on_a_gpu
    failures = iter([OUT_OF_MEMORY[0]] * times)

    def slide(*_: Any, **__: Any) -> torch.Tensor:
        for failure in failures:
            raise failure
        return torch.ones(2)

    monkeypatch.setattr(sliding_window, "logits", slide)
    assert torch.equal(liver.logits(torch.zeros(1)), torch.ones(2))
    assert sent == sent_to
    assert emptied == [GPU] * times
    assert liver.ran_on == ran_on
    assert len(liver.flags) == min(times, 1)
    liver.forget()
    assert (liver.flags, liver.ran_on) == ((), "cuda:1")


def test_a_finished_answer_outlives_a_network_that_cannot_come_back(
    on_a_gpu: tuple[Network, list[torch.device], list[torch.device]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    liver, _, _ = on_a_gpu

    def full(device: torch.device) -> torch.nn.Module:
        if device == GPU:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return liver.module

    monkeypatch.setattr(liver.module, "to", full)
    monkeypatch.setattr(sliding_window, "logits", lambda *_, **__: torch.ones(2))
    assert torch.equal(liver.logits(torch.zeros(1)), torch.ones(2))
    assert liver.ran_on == "cpu"
    assert "no room for the network yet" in caplog.text


def test_a_device_without_room_for_the_weights_is_retryable(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[torch.device] = []

    def full(*_: object, **__: object) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nnunet, "release", emptied.append)
    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(DeviceExhausted, match="ran out of memory for the weights of nnUNetTrainer"):
        network("liver")
    assert emptied == [CPU]


def test_nnunets_own_step_down_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder(demo_models_dir() / STAGES["liver"])
    liver = Network(folder, CPU, precision="float32", engine="reference")
    answers = iter([OUT_OF_MEMORY[0], torch.ones(2, 1, 1, 1)])

    def predict(*_: object) -> torch.Tensor:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(liver._predictor, "_internal_predict_sliding_window_return_logits", predict)
    monkeypatch.setattr(liver._predictor, "perform_everything_on_device", True)
    with contextlib.redirect_stdout(io.StringIO()):
        liver.logits(torch.zeros(1, 4, 4, 4))
    assert [flag.name for flag in liver.flags] == ["device_exhausted"]


def test_loading_a_network_leaves_cudnns_choice_of_algorithms_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.inference import predict_from_raw_data

    class OnGpu(predict_from_raw_data.nnUNetPredictor):
        """Does what nnU-Net's does for a GPU."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            torch.backends.cudnn.benchmark = True

    monkeypatch.setattr(predict_from_raw_data, "nnUNetPredictor", OnGpu)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert isinstance(network("liver")._predictor, OnGpu)
    assert torch.backends.cudnn.benchmark is False


def test_another_error_of_the_network_is_not_taken_for_exhaustion(
    phantom: Phantom, exhausting: Callable[[Exception, int], None]
) -> None:
    liver = network("liver")
    exhausting(RuntimeError("shapes do not fit"), 1)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        liver.predict(phantom.ct)


def test_a_gpu_steps_down_to_results_beside_it_then_to_the_cpu() -> None:
    assert [str(placement) for placement in placements(torch.device("cuda", 1))] == [
        "cuda:1", "cuda:1 with results on cpu", "cpu"
    ]  # fmt: skip
    assert [str(placement) for placement in placements(CPU)] == ["cpu"]


def test_torch_starts_no_more_threads_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        for asked, cores, expected in ((4, 2, 2), (1, 2, 1)):
            torch.set_num_threads(asked)
            monkeypatch.setattr(device, "cores", lambda cores=cores: cores)
            network("lowres")
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("axes", "shape"), [((), (20, 40, 70)), ((), (50, 30, 64)), ((0, 2), (20, 30, 40)), ((1,), (20, 40, 70))]
)
def test_the_window_slides_as_nnunets_does_bit_for_bit(axes: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(1, *shape)).astype(np.float32))
    folder = ModelFolder(demo_models_dir() / STAGES["lowres"])
    ours = Network(folder, CPU, precision="float32", mirroring=bool(axes))
    theirs = Network(folder, CPU, precision="float32", mirroring=bool(axes), engine="reference")
    theirs._predictor.allowed_mirroring_axes = ours._predictor.allowed_mirroring_axes = axes
    with contextlib.redirect_stdout(io.StringIO()):
        expected = theirs.logits(image)
    assert expected.std() > 0.1
    assert torch.equal(ours.logits(image), expected)


@pytest.mark.parametrize("together", [2, 3, 8, 50])
def test_patches_and_mirrored_passes_together_answer_as_one_by_one(together: int) -> None:
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 20, 40, 90)).astype(np.float32))
    lowres = network("lowres")
    seen: list[int] = []

    def counted(patches: torch.Tensor) -> torch.Tensor:
        seen.append(len(patches))
        return lowres.module(patches)

    def slid(count: int) -> torch.Tensor:
        seen.clear()
        heads = lowres._predictor.label_manager.num_segmentation_heads
        size, here = lowres.patch_size, Placement(CPU, CPU)
        return sliding_window.logits(counted, image, size, heads, here, mirror_axes=(0, 2), together=count)

    alone = slid(1)
    passes = len(seen)
    assert set(seen) == {1}
    assert passes % 4 == 0  # each patch is seen in 4 ways
    assert passes > 4
    batched = slid(together)
    assert seen == [*[together] * (passes // together), *([passes % together] if passes % together else [])]
    torch.testing.assert_close(batched, alone, atol=2e-3, rtol=2e-3)  # a few steps of half precision
    assert (batched.argmax(0) == alone.argmax(0)).float().mean() > 0.9999


@pytest.mark.parametrize(("axes", "together"), [((), 1), ((2,), 1), ((2,), 4)])
def test_patches_without_anything_in_them_are_computed_once(axes: tuple[int, ...], together: int) -> None:
    """A liver that was cut out fills its box badly: most of the patches lie beside it, and are all the same."""
    lowres = network("lowres")
    z, y, x = lowres.patch_size
    image = torch.full((1, z, y, 4 * x), -1.5)
    image[0, 4 : z - 4, 4 : y - 4, 5 : x // 3] = torch.linspace(-1, 1, x // 3 - 5)
    count, kept = [0], lowres.module

    def counted(patches: torch.Tensor) -> torch.Tensor:
        count[0] += len(patches)
        return kept(patches)

    def slid(module: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        heads, here = lowres._predictor.label_manager.num_segmentation_heads, Placement(CPU, CPU)
        return sliding_window.logits(module, image, lowres.patch_size, heads, here, mirror_axes=axes, together=together)

    seen = slid(counted)
    assert count[0] == 2 ** len(axes) + 1  # the patch at the edge, each way, and one of the six beside it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliding_window, "_only_values", lambda _: None)
        torch.testing.assert_close(seen, slid(kept), atol=0 if together == 1 else 2e-3, rtol=0)
    assert seen.std() > 0.1


def test_a_gpu_takes_as_many_patches_together_as_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"memory_allocated": 100, "max_memory_allocated": 150, "memory_reserved": 180, "mem_get_info": (320, 1000)}
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    held = measure_from_here(GPU)
    assert (held, reset) == (100, [GPU])
    assert fit_together(GPU, 100, 16) == 6  # three quarters of 320 + 80, by 50 each
    assert fit_together(GPU, 100, 4) == 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 1000))
    assert fit_together(GPU, 0, 16) == 1  # the one that has run, runs again
    assert measure_from_here(CPU) is None


def test_only_what_goes_to_a_gpu_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody waits until it is there; what lies on the GPU already stays."""
    seen: list[tuple[str, Any]] = []
    there = torch.ones(2, device="meta")

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(("pinned", tensor.device.type))
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, **how: bool) -> torch.Tensor:
        seen.append((str(device), how))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    sent(torch.ones(2), GPU)
    assert seen == [("pinned", "cpu"), ("cuda:1", {"non_blocking": True})]
    seen.clear()
    sent(there, GPU)
    sent(torch.ones(2), CPU)
    assert seen == [("cuda:1", {}), ("cpu", {})]


@pytest.mark.parametrize("finer", [1.0, 0.7])
def test_the_highest_logit_names_the_label_as_in_nnunets_export(finer: float) -> None:
    """At the network's own spacing nothing is resampled; of equal logits, and half precision has many, the first."""
    from nnunetv2.inference import export_prediction

    lowres = network("lowres")
    spacing_mm = [mm * finer for mm in lowres.spacing_mm]
    rng = np.random.default_rng(5)
    channels, _, properties = lowres.preprocess(rng.normal(size=(1, 9, 11, 13)).astype(np.float32), None, spacing_mm)
    assert (channels.shape[1:] == (9, 11, 13)) == (finer == 1.0)
    heads = lowres._predictor.label_manager.num_segmentation_heads
    logits = torch.from_numpy(rng.integers(-2, 3, size=(heads, *channels.shape[1:])).astype(np.float16))
    predictor = lowres._predictor
    expected = export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.float(), predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, properties
    )
    assert len(np.unique(expected)) == heads
    np.testing.assert_array_equal(lowres._labels(logits, properties), expected)


@pytest.mark.parametrize(("regions", "by_torch"), [(False, True), (False, False), (True, False)])
def test_labels_lie_where_nnunets_export_puts_them(regions: bool, by_torch: bool) -> None:
    """Plans that turn the axes, slices so thick that each is resampled by itself, and a black border, cut off."""
    from nnunetv2.inference import export_prediction
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    lowres = network("lowres")
    predictor = lowres._predictor
    predictor.plans_manager.plans |= {"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]}
    if not by_torch:  # as nnU-Net plans it; the demo's plans ask for torch
        predictor.configuration_manager.configuration |= {
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        }
    if regions:
        predictor.label_manager = LabelManager({"background": 0, "liver": [1, 2], "lesion": 2}, [1, 2])
    rng = np.random.default_rng(5)
    image = rng.normal(size=(1, 12, 14, 16)).astype(np.float32)
    image[:, :3], image[:, :, :1], image[:, :, :, 10:] = 0, 0, 0
    spacing_mm = [mm * finer for mm, finer in zip(lowres.spacing_mm, (0.6, 0.8, 4.0), strict=True)]
    channels, _, properties = lowres.preprocess(image, None, spacing_mm)
    assert properties["bbox_used_for_cropping"] == [[1, 14], [0, 10], [3, 12]], "in the order of the plans"
    logits = torch.from_numpy(rng.normal(size=(2, *channels.shape[1:])).astype(np.float16))
    expected = export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.float(), predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, properties
    )
    assert expected.shape == image.shape[1:]
    assert np.unique(expected).tolist() == ([0, 1, 2] if regions else [0, 1])
    found = lowres._labels(logits, properties)
    np.testing.assert_array_equal(found, expected)


def test_numbers_that_are_not_finite_are_refused() -> None:
    image = torch.full((1, 48, 48, 64), float("nan"))
    with pytest.raises(PipelineError, match="not finite"):
        network("lowres").logits(image)


def test_the_weights_lie_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the network; those that were read, mapped from the file, are let go of."""
    read, kept = nnunet._read_checkpoint, []

    def noted(file: Path) -> dict[str, Any]:
        found = read(file)
        kept.extend(weakref.ref(tensor) for tensor in found["network_weights"].values())
        return found

    monkeypatch.setattr(nnunet, "_read_checkpoint", noted)
    lowres = network("lowres")
    gc.collect()
    assert len(kept) == len(lowres.module.state_dict()) > 0
    assert not [ref for ref in kept if ref() is not None]


def test_the_engine_is_what_the_settings_say_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", "true")
    monkeypatch.setattr(torch, "compile", lambda _: torch.nn.Identity())
    assert isinstance(network("lowres").module, PlainConvUNet)


def test_plans_of_the_old_format_load_too(liver_copy: Path) -> None:
    """The old format names widths by the first one, doubled from stage to stage."""
    new = json.loads((liver_copy / "plans.json").read_text())
    checkpoint = torch.load(liver_copy / "fold_0" / CHECKPOINT, weights_only=True)
    configuration = new["configurations"][checkpoint["init_args"]["configuration"]]
    design = configuration["architecture"]["arch_kwargs"]
    stages = design["n_stages"]
    design["features_per_stage"] = [4 * 2**stage for stage in range(stages)]
    design["n_conv_per_stage"], design["n_conv_per_stage_decoder"] = [2] * stages, [2] * (stages - 1)
    torch.manual_seed(5)
    module = PlainConvUNet(1, num_classes=2, **as_classes(design))
    torch.save(checkpoint | {"network_weights": module.state_dict()}, liver_copy / "fold_0" / CHECKPOINT)
    old = json.loads(json.dumps(new))
    flat = old["configurations"][checkpoint["init_args"]["configuration"]]
    del flat["architecture"]
    flat |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": design["n_conv_per_stage"],
        "n_conv_per_stage_decoder": design["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [stages - 1] * 3,
        "pool_op_kernel_sizes": design["strides"],
        "conv_kernel_sizes": design["kernel_sizes"],
    }
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 8, 8, 8)).astype(np.float32))
    answers = []
    for plans in (new, old):
        (liver_copy / "plans.json").write_text(json.dumps(plans))
        answers.append(Network(ModelFolder(liver_copy), CPU, precision="float32").logits(image))
    assert torch.equal(*answers)


def as_classes(design: dict[str, Any]) -> dict[str, Any]:
    """The architecture's words as the classes they name."""
    named = {key: pydoc.locate(design[key]) for key in ("conv_op", "norm_op", "nonlin")}
    return design | named | {"dropout_op": None, "deep_supervision": False}


def test_an_unloaded_network_keeps_no_weights(
    phantom: Phantom, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[torch.device] = []
    monkeypatch.setattr(nnunet, "release", emptied.append)
    caplog.set_level("INFO", "salsa_node.pipelines.nnunet")
    liver = network("liver")
    weights = weakref.ref(next(liver.module.parameters()))
    assert weights() is not None
    liver.unload()
    liver.unload()
    assert weights() is None
    assert emptied == [CPU]
    with pytest.raises(PipelineError, match="was unloaded"):
        liver.predict(phantom.ct)
    assert [record.event for record in caplog.records] == ["network.loaded", "network.unloaded"]


@pytest.mark.parametrize(
    ("wanted", "words"), [("tpu", "must be auto, cpu or cuda:N"), ("cuda:x", "must be auto"), ("cuda:99", "torch sees")]
)
def test_a_device_that_is_not_there_is_refused(wanted: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_device(wanted)


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision must be"):
        Network(ModelFolder(demo_models_dir() / STAGES["liver"]), CPU, precision="half")


def test_torchvision_imports_beside_a_cpu_torch_after_a_network_was_loaded() -> None:
    code = (
        "import torch\n"
        "from salsa_node.models import ModelFolder, demo_models_dir\n"
        "from salsa_node.models import DEMO_STAGES as STAGES\n"
        "from salsa_node.pipelines.nnunet import Network\n"
        "Network(ModelFolder(demo_models_dir() / STAGES['liver']), torch.device('cpu'))\n"
        "import torchvision\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""

"""Where a network computes: the device that is asked for, and where it steps down to when memory runs out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version

import torch

from salsa_node.errors import ConfigError
from salsa_node.processors import cores

os.environ.setdefault("nnUNet_def_n_proc", str(min(8, cores())))  # nnU-Net reads it at import

_EXHAUSTED = (  # of torch's CPU allocator and of the libraries below it, which have no type of their own for it
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "bad_alloc",
)
_LIBRARIES = ("torch", "nnunetv2", "dynamic_network_architectures")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the network multiplies, and where what it answers is collected."""

    compute: torch.device
    results: torch.device

    def __str__(self) -> str:
        """In words, for messages."""
        return f"{self.compute}" if self.compute == self.results else f"{self.compute} with results on {self.results}"


def choose_device(wanted: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda:N" names. Raises ConfigError where there is no such device."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, number = wanted.partition(":")
    if wanted == "auto":
        kind, number = "cuda", ""
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ConfigError(f"device must be auto, cpu or cuda:N; found {wanted!r}")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device {wanted} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def placements(device: torch.device) -> tuple[Placement, ...]:
    """What to try on `device`, in order: each needs less of its memory than the one before, and is slower."""
    cpu = torch.device("cpu")
    if device.type == "cpu":
        return (Placement(cpu, cpu),)
    return (Placement(device, device), Placement(device, cpu), Placement(cpu, cpu))


def all_places(*places: str) -> str:
    """Where the networks of one run were computed, each place once, in words."""
    return "; ".join(dict.fromkeys(places))


def use_no_more_than_cores() -> None:
    """Let torch start no more threads than `cores`: of a container's quota it knows nothing, and would wait for them.

    Fewer, as `OMP_NUM_THREADS` may have asked for, stay fewer.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cores()))


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32, not faster."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())


def is_exhaustion(error: RuntimeError | MemoryError) -> bool:
    """Whether this error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error).lower()
    return any(words in told for words in _EXHAUSTED)


def release(device: torch.device) -> None:
    """Give what torch keeps in reserve on a GPU back to it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same numbers on `device`: to a GPU from page-locked memory, without waiting until they are there.

    What the GPU is asked for afterwards comes after them; torch keeps the page-locked copy until then.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def measure_from_here(device: torch.device) -> int | None:
    """Begin to measure what a GPU holds at most; the bytes that it holds now, None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def fit_together(device: torch.device, held_bytes: int, most: int) -> int:
    """How many passes a GPU has room for at once, judged by the one since `measure_from_here`; 1 to `most`.

    held_bytes: what that returned. A quarter of what is free stays free: libraries want work space of their own.
    """
    of_one = max(torch.cuda.max_memory_allocated(device) - held_bytes, 1)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, and unused
    free = torch.cuda.mem_get_info(device)[0] + reserved
    return max(1, min(most, int(0.75 * free) // of_one))


def libraries(*more: str) -> dict[str, str]:
    """Distribution -> version, of the libraries that decide what a network answers, and of `more`."""
    return {name: version(name) for name in (*_LIBRARIES, *more)}

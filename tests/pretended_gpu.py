"""A GPU that is none: tensors that are sent to it stay on the CPU, and are held to the rules of a device of their own.

What torch refuses on a real one is refused here: to compute with tensors of two devices at once, to look at a
tensor's memory from the CPU, to page-lock what does not lie in the CPU's memory. What it cannot show is the hardware:
speed, CUDA's own arithmetic, and when a copy that nobody waits for arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
_OF_ONE = 100  # bytes that one pass takes, as the pretended memory counts them
_MULTIPLY = (torch.conv3d, torch.conv_transpose3d)
_COPIES = (torch.Tensor.to, torch.Tensor.cpu)
_ACROSS = (torch.Tensor.copy_, torch._has_compatible_shallow_copy_type)  # what torch does between two devices


def lies_there(tensor: torch.Tensor) -> bool:
    """Whether it lies on the pretended GPU."""
    return bool(tensor.__dict__.get("_lies_there", False))


def _placed(made: Any, there: bool) -> Any:
    for one in tree_leaves(made):
        if isinstance(one, torch.Tensor):
            one.__dict__["_lies_there"] = there
    return made


def _asked_for(arguments: tuple[Any, ...], named: dict[str, Any]) -> torch.device | None:
    """The device among the arguments of a call."""
    found = [one for one in (*arguments, named.get("device")) if isinstance(one, torch.device | str)]
    return torch.device(found[0]) if found else None


class PretendedGpu(TorchFunctionMode):
    """While it is entered, "cuda:0" can be computed on.

    page_locked: how many tensors were, on their way. precisions: of each autocast, the device. halves: whether
    convolutions answer in half precision now, as they do under autocast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.page_locked = 0
        self.precisions: list[str] = []
        self.halves = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        first = args[0] if args else None
        if func == torch.Tensor.device.__get__ and lies_there(first):
            return DEVICE
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and lies_there(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func == torch.Tensor.pin_memory:
            if lies_there(first):
                raise RuntimeError("cannot pin 'torch.cuda.HalfTensor' only dense CPU tensors can be pinned")
            self.page_locked += 1
            return first.clone()
        if func == torch.Tensor.data.__set__:
            made = func(*args, **named)
            _placed(first, lies_there(args[1]))
            return made
        if func in _COPIES:
            return self._copied(func, first, args[1:], named)
        if self.halves and func in _MULTIPLY:
            made = func(*(one.float() if isinstance(one, torch.Tensor) else one for one in args), **named)
            return _placed(made.half(), self._one_place(func, args, named))
        device = _asked_for((), named)
        if device is not None:
            made = func(*args, **(named | {"device": CPU}))
            return _placed(made, device.type == "cuda")
        if func in _ACROSS:
            return func(*args, **named)
        there = self._one_place(func, args, named)
        if func == torch.Tensor.__iter__:
            return iter(_placed(list(func(*args)), there))
        made = func(*args, **named)
        return _placed(made, there) if there else made

    def _one_place(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> bool:
        """Whether this is computed on the GPU; a single number may come from elsewhere."""
        tensors = [one for one in tree_leaves((args, named)) if isinstance(one, torch.Tensor)]
        if len({lies_there(one) for one in tensors if one.ndim}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found two, in {func}")
        return any(lies_there(one) for one in tensors)

    def _copied(
        self, func: Callable[..., Any], tensor: torch.Tensor, more: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        device = CPU if func == torch.Tensor.cpu else _asked_for(more, named)
        there = lies_there(tensor) if device is None else device.type == "cuda"
        here = tuple(CPU if isinstance(one, torch.device | str) else one for one in more)
        kept = named | ({"device": CPU} if "device" in named else {})
        moved = tensor.clone() if there != lies_there(tensor) else tensor
        made = func(moved, *here, **kept)
        return _placed(made, there)


@contextmanager
def pretended_gpu(passes: int) -> Iterator[PretendedGpu]:
    """A GPU with room for so many passes at once, which multiplies in float16 as autocast does on a real one."""
    precise = torch.autocast
    gpu = PretendedGpu()

    @contextmanager
    def halved() -> Iterator[None]:
        gpu.halves = True
        yield
        gpu.halves = False

    def autocast(kind: str, *arguments: Any, **how: Any) -> Any:
        gpu.precisions.append(kind)
        return halved() if kind == "cuda" else precise(kind, *arguments, **how)

    told: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "device": lambda _: nullcontext(),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _: None,
        "memory_allocated": lambda _: 7,
        "memory_reserved": lambda _: 7,
        "max_memory_allocated": lambda _: 7 + _OF_ONE,
        "mem_get_info": lambda _: (_OF_ONE * passes * 4 // 3 + 1, 10**9),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in told.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "autocast", autocast)
        with gpu:
            yield gpu

"""Arrays to the device and results back, holding up neither the host nor the device.

On CPUs nothing is copied that need not be. On CUDA, batches go through page-locked memory and two sets of
device buffers on a stream of their own, so a batch travels while the update before it runs; results go into
page-locked memory on another stream and are waited for only when somebody reads them. Used by agents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[np.generic]]
Tensors = dict[str, Tensor]
Buffers = TypeVar("Buffers")

SLOTS = 2
"""Batches on the device at a time: one in use, one arriving."""
KINDS = 3
"""Kinds of batches, by names and shapes, whose buffers are kept: those of training, and the small ones of
probes in between, which must not cost the next batch its buffers.
"""


class Upload(Protocol):
    """Brings named arrays to the device; what it returned is valid until it is called again."""

    def __call__(self, arrays: Mapping[str, NDArray[np.generic]]) -> Tensors: ...
    def settle(self) -> None: ...  # returns when the arrays may be overwritten


class Download(Protocol):
    """Starts bringing tensors to the host; the call it returns waits and gives the arrays."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> Callable[[], Arrays]: ...


def make_upload(device: torch.device) -> Upload:
    return CudaUpload(device) if device.type == "cuda" else DirectUpload(device)


def make_download(device: torch.device) -> Download:
    return CudaDownload(device) if device.type == "cuda" else direct_download


def batch_buffers(
    device: torch.device,
) -> Callable[[NDArray[np.generic]], NDArray[np.generic]] | None:
    """What makes the buffers that `learner.batches` copies into: page-locked ones where that helps."""
    return pinned_like if device.type == "cuda" else None


def pinned_like(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """An empty page-locked array of the same shape and type: devices read it without another copy."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return torch.empty(array.shape, dtype=dtype, pin_memory=True).numpy()


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """The array as a CPU tensor, sharing memory where torch allows it: it wants arrays writable."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class DirectUpload:
    """For CPUs: the tensors are the arrays. Other devices get an ordinary copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: Mapping[str, NDArray[np.generic]]) -> Tensors:
        return {name: as_tensor(array).to(self._device) for name, array in arrays.items()}

    def settle(self) -> None:
        return None


def direct_download(tensors: Mapping[str, Tensor]) -> Callable[[], Arrays]:
    """For CPUs: the arrays are the tensors."""
    return lambda: {name: to_array(tensor.cpu()) for name, tensor in tensors.items()}


def to_array(tensor: Tensor) -> NDArray[np.generic]:
    """A CPU tensor as an array that shares its memory; bfloat16 as its bits, uint16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Turns(Generic[Buffers]):
    """Sets of buffers for arrays of a few kinds: SLOTS of each kind, used in turn."""

    def __init__(self, make: Callable[[Mapping[str, NDArray[np.generic]]], Buffers]) -> None:
        """make(arrays): new buffers for arrays of these names, shapes and types."""
        self._make = make
        self._rings: dict[tuple[Any, ...], list[Buffers]] = {}  # used last comes last, next to use is first

    def take(self, arrays: Mapping[str, NDArray[np.generic]]) -> Buffers:
        """The buffers of this kind that were not used for longest; new ones while there are fewer than SLOTS.

        A kind that is new when there are KINDS takes the place of the one not seen for longest.
        """
        kind = tuple((name, array.shape, array.dtype.str) for name, array in sorted(arrays.items()))
        ring = self._rings.pop(kind, [])
        if not ring and len(self._rings) >= KINDS:
            del self._rings[next(iter(self._rings))]
        buffers = self._make(arrays) if len(ring) < SLOTS else ring.pop(0)
        self._rings[kind] = [*ring, buffers]
        return buffers


class CudaUpload:
    """Two sets of buffers in turn for each kind of batch, filled on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._turns = Turns(self._allocate)
        self._last: _Slot | None = None

    def _allocate(self, arrays: Mapping[str, NDArray[np.generic]]) -> _Slot:
        """Memory that was freed for it may still be read by what was launched: wait."""
        self._stream.synchronize()
        torch.cuda.current_stream(self._device).synchronize()
        return _Slot(arrays, self._device)

    def __call__(self, arrays: Mapping[str, NDArray[np.generic]]) -> Tensors:
        main = torch.cuda.current_stream(self._device)
        if self._last is not None:  # whatever reads the batch before this one has been launched by now
            self._last.read.record(main)
        slot = self._last = self._turns.take(arrays)
        if slot.arrived is not None:
            slot.arrived.synchronize()  # two calls ago: its page-locked buffers are free again
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.read)  # passes where none was recorded yet
            for name, array in arrays.items():
                slot.device[name].copy_(slot.source(name, array), non_blocking=True)
            slot.arrived = torch.cuda.Event(blocking=True)
            slot.arrived.record(self._stream)
        main.wait_event(slot.arrived)
        return dict(slot.device)

    def settle(self) -> None:
        if self._last is not None and self._last.arrived is not None:
            self._last.arrived.synchronize()


class _Slot:
    """Page-locked and device buffers of one batch."""

    def __init__(self, arrays: Mapping[str, NDArray[np.generic]], device: torch.device) -> None:
        self.host = {name: torch.from_numpy(pinned_like(array)) for name, array in arrays.items()}
        self.device = {name: torch.empty_like(host, device=device) for name, host in self.host.items()}
        self.read = torch.cuda.Event()  # the device is done with `device`
        self.arrived: torch.cuda.Event | None = None  # the device is done with `host`

    def source(self, name: str, array: NDArray[np.generic]) -> Tensor:
        """The array itself when it is page-locked, else a copy that is."""
        if array.flags.writeable and array.flags.c_contiguous:
            tensor = torch.from_numpy(array)
            if tensor.is_pinned():
                return tensor
        np.copyto(self.host[name].numpy(), array, casting="no")
        return self.host[name]


class CudaDownload:
    """Copies on a stream of their own into page-locked memory that belongs to the result."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Callable[[], Arrays]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        host: Tensors = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                tensor.record_stream(self._stream)  # not handed out again before it has been copied
                host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host[name].copy_(tensor, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)

        def result() -> Arrays:
            done.synchronize()
            return {name: to_array(tensor) for name, tensor in host.items()}

        return result

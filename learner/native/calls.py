"""Calls into the compiled library: structures of plain memory whose tensors live as long as they do."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

WRONG_MIRROR = 2


class Block(ctypes.Structure):
    """A structure of the library; subclasses list its fields. `bytes`, the first, is its size."""

    def __init__(self, **values: int | float | Tensor | tuple[Tensor, ...]) -> None:
        names = [name for name, _ in self._fields_[1:]]  # type: ignore[misc]
        assert sorted(values) == sorted(names), sorted(set(values) ^ set(names))
        super().__init__()
        self.bytes = ctypes.sizeof(self)
        self._kept: list[Any] = list(values.values())
        for name, value in values.items():
            if isinstance(value, tuple):  # an array of arrays
                array = (ctypes.c_void_p * len(value))(*map(address, value))
                self._kept.append(array)
                setattr(self, name, ctypes.addressof(array))
            else:
                setattr(self, name, address(value) if isinstance(value, Tensor) else value)


def fields(numbers: str, *arrays: str) -> list[tuple[str, Any]]:
    """Fields in order: words that begin with "int:" or "float:", then names of arrays."""
    kinds: dict[str, Any] = {"int": ctypes.c_int64, "float": ctypes.c_double, "": ctypes.c_void_p}
    parts = (word.rpartition(":") for word in (*numbers.split(), *arrays))
    return [("bytes", ctypes.c_int64), *((name, kinds[kind]) for kind, _, name in parts)]


def address(tensor: Tensor) -> int:
    """Where a contiguous tensor of floats, counts or bytes lies in the CPU's memory."""
    assert tensor.dtype in (torch.float32, torch.int64, torch.uint8), tensor.dtype
    assert tensor.device.type == "cpu", tensor.device
    assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    return tensor.data_ptr()


def call(function: Any, *blocks: Block) -> None:
    """Run a region; the interpreter lock is free meanwhile. Raises: MemoryError."""
    code = function(*(ctypes.byref(block) for block in blocks))
    assert code != WRONG_MIRROR, f"{function.__name__}: structures differ between Python and C++"
    if code:
        raise MemoryError(f"{function.__name__}: no memory for its buffers")

"""A recorder for CPUs: notes every operation of a call and repeats them on the very same tensors.

What a CUDA graph does to kernels: no Python runs in a replay, inputs and outputs lie where they lay, and
numbers that Python had looked up stay what they were. An operation that a capture refuses is refused here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = {
    "aten::_local_scalar_dense": "reads a value on the host",
    "aten::is_nonzero": "reads a value on the host",
    "aten::equal": "reads a value on the host",
    "aten::nonzero": "has a shape that depends on values",
    "aten::masked_select": "has a shape that depends on values",
    "aten::_unique2": "has a shape that depends on values",
    "aten::unique_dim": "has a shape that depends on values",
    "aten::bincount": "has a shape that depends on values",
    "aten::lift_fresh": "makes a tensor from numbers on the host, which copies them to the device",
    "aten::lift": "makes a tensor from numbers on the host, which copies them to the device",
}
DRAWS = {
    "aten::rand",
    "aten::randn",
    "aten::uniform_",
    "aten::normal_",
    "aten::bernoulli_",
    "aten::exponential_",
}


def objection(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a device could not carry out this call without the host; empty when it can."""
    name = func._schema.name
    if name in WAITS:
        return WAITS[name]
    if name in DRAWS:
        return "draws random numbers"
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if name in ("aten::index", "aten::index_put_") and any(
        x.dtype == torch.bool for x in tree_flatten(args[1])[0] if isinstance(x, Tensor)
    ):
        return "has a shape that depends on values"
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "has a shape that depends on values"
    devices = {x.device for x in tensors if x.dim() or name in ("aten::copy_", "aten::where")}
    if kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]))
    return f"copies between {sorted(map(str, devices))}" if len(devices) > 1 else ""


class NoHost(TorchDispatchMode):
    """Raises: RuntimeError for every operation that would make a device wait for the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if why := objection(func, args, kwargs):
            raise RuntimeError(f"{func} {why}")
        return func(*args, **kwargs)


class Tape(TorchDispatchMode):
    """The operations of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, Tensor] = {}
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if why := objection(func, args, kwargs):
            raise RuntimeError(f"{func} {why}")
        out = func(*args, **kwargs)
        fresh = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        if not func.is_view:  # a view keeps looking at the same memory
            self.steps.append((func, args, kwargs, fresh))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(
                outputs, [x for x in tree_flatten(again)[0] if isinstance(x, Tensor)], strict=True
            ):
                if old.data_ptr() != new.data_ptr() or old.numel() == 0:
                    old.copy_(new)


class TapeRecorder:
    """Implements learner.capture.Recorder."""

    executes = True
    warmups = 1

    def __init__(self) -> None:
        self.warmed = self.recorded = self.replayed = 0

    def warm(self, call: Any) -> dict[str, Tensor]:
        self.warmed += 1
        return call()

    def record(self, call: Any) -> Tape:
        self.recorded += 1
        with Tape() as tape:
            tape.outputs = call()
        return tape

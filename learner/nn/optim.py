"""Flat parameter buffer and the DreamerV3 optimiser: adaptive gradient clipping, then LaProp.

Source: arXiv 2301.04104, "Optimizer"; LaProp: Ziyin et al., arXiv 2002.04839; AGC: Brock et al.,
arXiv 2102.06171. All parameters are views of one buffer, so the elementwise part is a handful of operations
whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from system.errors import SchemaError

Arrays = dict[str, NDArray[np.generic]]


class FlatParameters:
    """Moves the parameters of a module into one float32 buffer; `values[a:b]` is one whole tensor."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = tuple(named)
        self.shapes = [tuple(p.shape) for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        self.count = sum(self.sizes)
        self.values = torch.cat([p.detach().reshape(-1) for p in named.values()]).float().to(device)
        self.grads = torch.zeros_like(self.values)
        module.to(device)
        for parameter, value, grad in zip(
            named.values(), self.views(self.values), self.views(self.grads), strict=True
        ):
            parameter.data = value
            parameter.grad = grad

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view per parameter into a buffer laid out like `values`."""
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def to_arrays(self, flat: Tensor) -> Arrays:
        """A buffer as named float32 arrays (copies), for checkpoints and publishing."""
        views = self.views(flat.detach().to("cpu", copy=True))
        return {name: view.numpy() for name, view in zip(self.names, views, strict=True)}

    def from_arrays(self, flat: Tensor, arrays: Mapping[str, NDArray[np.generic]], what: str) -> None:
        """Fill a buffer from named arrays. Raises: SchemaError when names or shapes differ."""
        check_arrays(dict(zip(self.names, self.shapes, strict=True)), arrays, what)
        for name, view in zip(self.names, self.views(flat), strict=True):
            view.copy_(torch.from_numpy(np.asarray(arrays[name], np.float32)))


def check_arrays(
    expected: Mapping[str, tuple[int, ...]], arrays: Mapping[str, NDArray[np.generic]], what: str
) -> None:
    """Raises: SchemaError naming the first array that is missing, unknown or of another shape."""
    if strange := sorted(set(expected) ^ set(arrays)):
        side = "lack" if strange[0] in expected else "have an unknown"
        raise SchemaError(
            f"{what} {side} array {strange[0]!r} ({len(strange)} names differ); they belong to another "
            "model: use the same family, size and environment they were made with"
        )
    for name, shape in expected.items():
        if tuple(arrays[name].shape) != shape:
            raise SchemaError(
                f"{what}: array {name!r} has shape {tuple(arrays[name].shape)}, must be {shape}; they "
                "belong to another model: use the same family, size and environment they were made with"
            )


class LaProp:
    """AGC per tensor -> bias-corrected RMS scaling -> bias-corrected momentum -> warmed-up learning rate."""

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        lr: float,
        warmup: int,
        agc: float,
        agc_floor: float,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        self.parameters = parameters
        self.lr, self.warmup = lr, warmup
        self.agc, self.agc_floor = agc, agc_floor
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.updates = 0
        self.rms = torch.zeros_like(parameters.values)
        self.momentum = torch.zeros_like(parameters.values)
        device = parameters.values.device
        self._sizes = torch.tensor(parameters.sizes, device=device)

    def grad_norm(self) -> Tensor:
        """Euclidean norm [] of the whole gradient; not finite when any entry is not."""
        return torch.linalg.vector_norm(self.parameters.grads)

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients in the buffer, which are used up."""
        flat = self.parameters
        grads = flat.grads
        if self.agc:
            norms = torch.stack([torch.linalg.vector_norm(g) for g in flat.views(grads)])  # [tensors]
            sizes = torch.stack([torch.linalg.vector_norm(p) for p in flat.views(flat.values)])
            factor = 1.0 / (norms / (self.agc * sizes.clamp_min(self.agc_floor))).clamp_min(1.0)
            grads.mul_(factor.repeat_interleave(self._sizes, output_size=flat.count))
        self.updates += 1
        self.rms.mul_(self.beta2).addcmul_(grads, grads, value=1.0 - self.beta2)
        correction = 1.0 - self.beta2**self.updates
        grads.div_((self.rms / correction).sqrt_().add_(self.eps))
        self.momentum.lerp_(grads, 1.0 - self.beta1)
        rate = self.rate(self.updates - 1) / (1.0 - self.beta1**self.updates)
        flat.values.add_(self.momentum, alpha=-rate)

    def rate(self, applied: int) -> float:
        """Learning rate after `applied` updates: linear from 0 over the warmup, then constant."""
        return self.lr * min(1.0, applied / self.warmup) if self.warmup else self.lr

    def state(self) -> dict[str, object]:
        """Moments as named arrays and the update count."""
        to_arrays = self.parameters.to_arrays
        return {"rms": to_arrays(self.rms), "momentum": to_arrays(self.momentum), "updates": self.updates}

    def load(self, rms: Arrays, momentum: Arrays, updates: int) -> None:
        """Restore what `state` returned. Raises: SchemaError when it belongs to another model."""
        self.parameters.from_arrays(self.rms, rms, "optimiser moments")
        self.parameters.from_arrays(self.momentum, momentum, "optimiser moments")
        self.updates = int(updates)

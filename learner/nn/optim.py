"""Flat parameter buffer and the DreamerV3 optimiser: adaptive gradient clipping, then LaProp.

Source: arXiv 2301.04104, "Optimizer"; LaProp: Ziyin et al., arXiv 2002.04839; AGC: Brock et al.,
arXiv 2102.06171. All parameters are views of one buffer, so the elementwise part is a handful of operations
whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learner.nn.lanes import cut, run_lanes
from system.errors import SchemaError

SLICE = 65536
"""Parameters that a CPU updates together: five arrays of them stay in its cache."""
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


def tensor_norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, [tensors]; on GPUs a few launches however many there are."""
    return torch.stack(torch._foreach_norm(tensors))  # type: ignore[reportPrivateImportUsage]


class Applied(NamedTuple):
    """What one optimiser step did, on the device: nothing here was waited for."""

    finite: Tensor  # [] bool; False: the step was skipped
    grad_norm: Tensor  # [], before clipping
    rate: Tensor  # [], learning rate of this step


class LaProp:
    """AGC per tensor -> bias-corrected RMS scaling -> bias-corrected momentum -> warmed-up learning rate.

    The step counter and all that depends on it live on the device, so that a step neither waits for the
    device nor changes its launches from one update to the next.
    """

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
        self.rms = torch.zeros_like(parameters.values)
        self.momentum = torch.zeros_like(parameters.values)
        device = parameters.values.device
        # float64: the bias corrections are differences from one.
        self._applied = torch.zeros((), dtype=torch.float64, device=device)
        self._sizes = torch.tensor(parameters.sizes, device=device)
        # Ten passes over a slice find it in cache after the first.
        whole = [slice(0, parameters.count)]
        self._slices = whole if device.type == "cuda" else cut(parameters.count, SLICE)
        self._value_views = parameters.views(parameters.values)
        self._grad_views = parameters.views(parameters.grads)

    @property
    def updates(self) -> int:
        """Steps applied so far; skipped ones do not count. Waits for the device."""
        return int(self._applied.item())

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> Applied:
        """Apply the gradients in the buffer, which are used up, unless `loss` [] or their norm is not finite.

        A skipped step leaves weights, moments and counter as they were.
        """
        flat, grads = self.parameters, self.parameters.grads
        norms = tensor_norms(self._grad_views)
        grad_norm = torch.linalg.vector_norm(norms)
        finite = torch.isfinite(grad_norm if loss is None else grad_norm + loss)
        rate = self._rate(self._applied)
        self._applied.add_(finite)
        # A skipped first step divides by the correction of the step it would have been.
        count = self._applied.clamp_min(1.0)
        if self.agc:
            sizes = tensor_norms(self._value_views)
            self._clip(1.0 / (norms / (self.agc * sizes.clamp_min(self.agc_floor))).clamp_min(1.0))
        share = finite.double()  # 1 or 0
        decay, correction = 1.0 - share * (1.0 - self.beta2), 1.0 - self.beta2**count
        mixing = (share * (1.0 - self.beta1)).float()
        size = (share * rate / (1.0 - self.beta1**count)).float()

        def move(part: slice) -> None:
            grad, rms, momentum = grads[part], self.rms[part], self.momentum[part]
            # Zero gradients at zero rates keep all bits; a factor of zero alone would keep a NaN.
            grad.masked_fill_(~finite, 0.0)
            rms.mul_(decay).addcmul_(grad, grad, value=1.0 - self.beta2)
            grad.div_((rms / correction).sqrt_().add_(self.eps))
            momentum.lerp_(grad, mixing)
            flat.values[part].addcmul_(momentum, size, value=-1.0)

        run_lanes(move, self._slices)
        return Applied(finite, grad_norm, rate.float())

    def _clip(self, factors: Tensor) -> None:
        """Multiply the gradient of each tensor by its factor [tensors]; in few launches on GPUs."""
        if factors.is_cuda:
            grads = self.parameters.grads
            grads.mul_(factors.repeat_interleave(self._sizes, output_size=grads.numel()))
            return
        for grad, factor in zip(self._grad_views, factors.unbind(), strict=True):
            grad.mul_(factor)

    def rate(self, applied: int) -> float:
        """Learning rate after `applied` updates: linear from 0 over the warmup, then constant."""
        return self._rate(torch.tensor(float(applied), dtype=torch.float64)).item()

    def _rate(self, applied: Tensor) -> Tensor:
        """`rate` of a count [] on the device, float64."""
        if not self.warmup:
            return torch.full_like(applied, self.lr)
        return self.lr * (applied / self.warmup).clamp_max(1.0)

    def state(self) -> dict[str, object]:
        """Moments as named arrays and the update count."""
        to_arrays = self.parameters.to_arrays
        return {"rms": to_arrays(self.rms), "momentum": to_arrays(self.momentum), "updates": self.updates}

    def load(self, rms: Arrays, momentum: Arrays, updates: int) -> None:
        """Restore what `state` returned. Raises: SchemaError when it belongs to another model."""
        self.parameters.from_arrays(self.rms, rms, "optimiser moments")
        self.parameters.from_arrays(self.momentum, momentum, "optimiser moments")
        self._applied.fill_(int(updates))

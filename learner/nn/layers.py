"""Layers with DreamerV3's initialisation: truncated normal by fan-in, zero bias, RMS norm without offset.

Source: Hafner et al., arXiv 2301.04104, "Model sizes" and "Network architecture". Letters: D features.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT_EPS = torch.tensor(1e-4).sqrt()  # epsilon 1e-4 is added to the mean square
TRUNCATION_GAIN = 1.1368  # 1 / standard deviation of a unit normal cut at +-2


class NormSilu(nn.Module):
    """RMS norm over the last axis, with scale and without offset, then SiLU: follows every hidden layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape [..., D]; float32 inside."""
        if torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return _NormSilu.apply(x, self.scale)  # type: ignore[return-value]
        return F.silu(rms_norm(x, self.scale))


def rms(x: Tensor) -> Tensor:
    """Root of the mean square over the last axis plus epsilon; float32 x [..., D], result [..., 1].

    Vector norm and hypot are two passes where square, mean, add and root are six.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.hypot(length * x.shape[-1] ** -0.5, ROOT_EPS)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Divide x [..., D] by its root mean square over the last axis and multiply by scale [..., D]."""
    wide = x.float()
    return (wide / rms(wide) * scale).to(x.dtype)


class NormGrad(NamedTuple):
    """Backward pass of x = silu(rms_norm(a) * scale), all of it that does not need the gradient of x.

    grad a = gain * grad x - unit * mean(gain * grad x * unit).
    """

    unit: Tensor  # a / rms(a)
    slope: Tensor  # d silu / d (unit * scale)
    gain: Tensor  # slope * scale / rms(a)
    active: Tensor  # x

    @classmethod
    def of(cls, a: Tensor, scale: Tensor) -> NormGrad:
        a = a.float()
        divisor = rms(a)
        unit = a / divisor
        y = unit * scale
        gate = torch.sigmoid(y)
        active = y * gate
        slope = torch.addcmul(gate, active, 1.0 - gate)
        return cls(unit, slope, slope * (scale / divisor), active)

    def scale_grad(self, grad: Tensor, keep: int) -> Tensor:
        """Gradient of the scale, summed over all but the last `keep` axes; grad is that of x."""
        return (grad * self.slope * self.unit).flatten(0, -keep - 1).sum(0)


class _NormSilu(torch.autograd.Function):
    """One node for nine: a third of the passes over memory of the composed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        parts = NormGrad.of(x, scale)
        ctx.save_for_backward(*parts[:3])
        return parts.active

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor]:
        unit, slope, gain = ctx.saved_tensors
        by_scale = (grads[0] * slope * unit).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, by_scale
        scaled = grads[0] * gain
        return torch.addcmul(scaled, unit, (scaled * unit).mean(-1, keepdim=True), value=-1.0), by_scale


class Linear(nn.Module):
    """Affine map; `outscale` shrinks the initial weights (0 for heads that must start at zero)."""

    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.outscale = outscale

    def reset(self, generator: torch.Generator) -> None:
        truncated_normal(self.weight, self.weight.shape[1], self.outscale, generator)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class BlockLinear(nn.Module):
    """Block-diagonal affine map: input and output are split into `blocks` that do not mix.

    The fan-in of the initialisation is the full input size, not that of one block, as in the official code.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        assert inputs % blocks == 0, (inputs, blocks)
        assert outputs % blocks == 0, (outputs, blocks)
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def reset(self, generator: torch.Generator) -> None:
        truncated_normal(self.weight, self.weight.shape[0] * self.weight.shape[1], 1.0, generator)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        blocks, inputs, _ = self.weight.shape
        split = x.reshape(-1, blocks, inputs).transpose(0, 1)  # [G, R, I]
        y = torch.bmm(split, self.weight)  # [G, R, O]
        y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)  # [..., G * O]
        return y + self.bias.to(y.dtype)


class Conv(nn.Module):
    """Stride-1 convolution that keeps the resolution; x [N, C, H, W]."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def reset(self, generator: torch.Generator) -> None:
        truncated_normal(self.weight, math.prod(self.weight.shape[1:]), 1.0, generator)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class MLP(nn.Module):
    """`layers` times linear, RMS norm, SiLU."""

    def __init__(self, inputs: int, units: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.linear = nn.ModuleList([Linear(a, b) for a, b in pairwise(sizes)])
        self.norm = nn.ModuleList([NormSilu(units) for _ in range(layers)])
        self.outputs = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = norm(linear(x))
        return x


def truncated_normal(weight: Tensor, fan_in: int, scale: float, generator: torch.Generator) -> None:
    """Fill with a normal of variance scale^2 / fan_in, cut at two deviations of the uncut normal."""
    if scale == 0.0:
        nn.init.zeros_(weight)
        return
    std = scale * TRUNCATION_GAIN / math.sqrt(fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight of `module` in registration order from one CPU generator."""
    for part in module.modules():
        if isinstance(part, Linear | BlockLinear | Conv):
            part.reset(generator)

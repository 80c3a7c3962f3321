"""Layers with DreamerV3's initialisation: truncated normal by fan-in, zero bias, RMS norm without offset.

Source: Hafner et al., arXiv 2301.04104, "Model sizes" and "Network architecture". Letters: D features.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-4
TRUNCATION_GAIN = 1.1368  # 1 / standard deviation of a unit normal cut at +-2


class Norm(nn.Module):
    """RMS norm over the last axis, with scale and without offset, computed in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Divide x [..., D] by its root mean square over the last axis and scale it by scale [D]."""
    return F.rms_norm(x.float(), scale.shape, scale, NORM_EPS).to(x.dtype)


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
        self.norm = nn.ModuleList([Norm(units) for _ in range(layers)])
        self.outputs = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = F.silu(norm(linear(x)))
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

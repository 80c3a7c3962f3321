"""The image encoder of an acting step: `learner.nn.encoder.ImageEncoder` without gradients, for a few images.

Images stay in the order height, width, channels. Where a convolution has fewer outputs than a vector
register has lanes, the four outputs that are pooled into one are computed side by side: a kernel one pixel
larger, moved by two, whose outputs are four times as many. Both agree with the encoder up to rounding.

Letters: n images, H, W sides of a level, C inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.encoder import ImageEncoder
from learner.nn.layers import ROOT_EPS

LANES = 16
"""float32 values of one AVX-512 register."""
MIDDLE = 127.5


class _Level(NamedTuple):
    """Convolution, pooling, RMS norm over channels, SiLU."""

    weight: Tensor  # [O, C, k, k], or [4 O, C, k + 1, k + 1] where four outputs are computed side by side
    bias: Tensor  # [O] or [4 O]
    scale: Tensor  # [O]
    share: Tensor  # [O], 1 / O
    padding: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, scale: Tensor) -> _Level:
        outputs, _, kernel, _ = weight.shape
        if outputs < LANES:
            parts = [F.pad(weight, (b, 1 - b, a, 1 - a)) for a in (0, 1) for b in (0, 1)]
            weight, bias = torch.cat(parts), bias.repeat(4)
        return cls(
            weight=weight.contiguous(memory_format=torch.channels_last),
            bias=bias.clone(),
            scale=scale.clone(),
            share=torch.full((outputs,), 1.0 / outputs),
            padding=kernel // 2,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[n, H / 2, W / 2, O] of x [n, H, W, C]."""
        planes, outputs = x.permute(0, 3, 1, 2), self.scale.shape[0]  # [n, C, H, W], channels last in memory
        if self.bias.shape[0] == outputs:
            y = F.max_pool2d(F.conv2d(planes, self.weight, self.bias, padding=self.padding), 2)
            y = y.permute(0, 2, 3, 1).contiguous()
        else:
            y = F.conv2d(planes, self.weight, self.bias, stride=2, padding=self.padding).permute(0, 2, 3, 1)
            y = torch.maximum(y[..., : 2 * outputs], y[..., 2 * outputs :])  # [n, H / 2, W / 2, 2 O]
            y = torch.maximum(y[..., :outputs], y[..., outputs:])
        rows = y.view(-1, outputs)
        inverse = torch.mv(rows * rows, self.share).add_(ROOT_EPS**2).rsqrt_().unsqueeze(-1)  # [R, 1]
        return F.silu(rows.mul_(inverse).mul_(self.scale), inplace=True).view(y.shape)


class FastImages:
    """The levels of an `ImageEncoder`, with the weights it has now."""

    def __init__(self, cnn: ImageEncoder) -> None:
        self._pad = cnn.pad
        self._levels: list[_Level] = []
        for conv, norm in zip(cnn.conv, cnn.norm, strict=True):
            weight, bias, scale = (cast("Tensor", x) for x in (conv.weight, conv.bias, norm.scale))
            # Pixels are not divided by 255: the weights of the first level are.
            self._levels.append(_Level.of(weight if self._levels else weight / 255.0, bias, scale))

    def __call__(self, image: Tensor) -> Tensor:
        """Tokens [n, E] of uint8 images [n, H, W, C]."""
        x = torch.sub(image, MIDDLE)
        if any(self._pad):
            x = F.pad(x, (0, 0, 0, self._pad[0], 0, self._pad[1]))
        for level in self._levels:
            x = level(x)
        return x.flatten(1)

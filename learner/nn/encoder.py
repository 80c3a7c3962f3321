"""Observations to tokens: vectors and discrete entries through an MLP, images through a CNN, concatenated.

Source: arXiv 2301.04104, "Network architecture"; numbers of the current official code. Any mix of keys goes.
Letters: B batch, T time, N images, C channels, E token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.nn.categorical import one_hot
from learner.nn.layers import MLP, Conv, NormSilu
from learner.nn.twohot import symlog
from learner.nn.vision import Level, encode, trainable
from system.errors import SchemaError
from system.specs import ArraySpec

MIN_CNN_SIDE = 16  # smaller "images" are symbolic grids (MiniGrid 7x7, MinAtar 10x10): read as vectors
MAX_CNN_SIDE = 256
CHUNK = 64  # images of 64x64 pixels per pass on CPUs: measured best
MIN_GRID = 3  # smallest side of the last feature map


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGroup:
    """Image keys of one resolution; they share a CNN by their channels."""

    keys: tuple[str, ...]
    side: tuple[int, int]  # height, width
    channels: tuple[int, ...]  # per key
    levels: int  # halvings

    @property
    def grid(self) -> tuple[int, int]:
        """Feature map after all halvings; images are zero-padded up to a multiple of 2 ** levels."""
        step = 2**self.levels
        return -(-self.side[0] // step), -(-self.side[1] // step)

    @property
    def padded(self) -> tuple[int, int]:
        return self.grid[0] << self.levels, self.grid[1] << self.levels


def split_obs(
    obs: Mapping[str, ArraySpec], max_levels: int
) -> tuple[dict[str, ArraySpec], tuple[ImageGroup, ...]]:
    """(keys read as vectors, image groups). Raises: SchemaError for images larger than a CNN takes."""
    vectors: dict[str, ArraySpec] = {}
    groups: dict[tuple[int, int], list[str]] = {}
    for key, spec in sorted(obs.items()):
        if spec.kind != "image" or min(spec.shape[:2]) < MIN_CNN_SIDE:
            vectors[key] = spec
            continue
        if max(spec.shape[:2]) > MAX_CNN_SIDE:
            raise SchemaError(
                f"image {key!r} has shape {spec.shape}; sides must be <= {MAX_CNN_SIDE}: "
                "resize it in the environment adapter"
            )
        groups.setdefault((spec.shape[0], spec.shape[1]), []).append(key)
    images = []
    for side, keys in sorted(groups.items()):
        levels = max(n for n in range(max_levels + 1) if -(-min(side) // 2**n) >= MIN_GRID)
        channels = tuple(obs[key].shape[2] for key in keys)
        images.append(ImageGroup(keys=tuple(keys), side=side, channels=channels, levels=levels))
    return vectors, tuple(images)


def flat_size(spec: ArraySpec) -> int:
    """Entries of one vector-like observation as the network reads it (one-hot for discrete kinds)."""
    size = 1
    for n in spec.shape:
        size *= n
    return size * spec.classes if spec.kind == "discrete" else size


class Encoder(nn.Module):
    """Reads a dict of observations; tokens of all keys are concatenated, vectors first."""

    def __init__(
        self,
        obs: Mapping[str, ArraySpec],
        *,
        units: int,
        layers: int,
        depth: int,
        mults: tuple[int, ...],
        kernel: int,
    ) -> None:
        super().__init__()
        self.vectors, self.images = split_obs(obs, len(mults))
        self.outputs = 0
        if self.vectors:
            self.mlp = MLP(sum(flat_size(s) for s in self.vectors.values()), units, layers)
            self.outputs += self.mlp.outputs
        depths = [depth * mult for mult in mults]
        self.cnn = nn.ModuleList(
            [ImageEncoder(group, depths[-group.levels :], kernel) for group in self.images]
        )
        for group in self.images:
            self.outputs += group.grid[0] * group.grid[1] * depths[-1]

    def compute_by(self, region: Callable[..., Tensor]) -> None:
        """From now on images of training passes go through `region`, see `learner.backends`."""
        for cnn in self.cnn:
            assert isinstance(cnn, ImageEncoder)
            cnn.encode = region

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Tokens [..., E] for obs values [..., *shape]; leading axes are free."""
        parts: list[Tensor] = []
        if self.vectors:
            parts.append(self.mlp(torch.cat([flatten(obs[k], s) for k, s in self.vectors.items()], -1)))
        for group, cnn in zip(self.images, self.cnn, strict=True):
            image = joined(obs, group)  # [..., H, W, C]
            tokens = cnn(image.flatten(0, -4))  # [N, E]
            parts.append(tokens.view(*image.shape[:-3], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def joined(obs: Mapping[str, Tensor], group: ImageGroup) -> Tensor:
    """The images of a group [..., H, W, C], side by side in their channels."""
    images = [obs[key] for key in group.keys]
    return images[0] if len(images) == 1 else torch.cat(images, -1)


def flatten(value: Tensor, spec: ArraySpec) -> Tensor:
    """One vector-like observation [..., *shape] as network input [..., flat_size], symlog or one-hot."""
    lead = value.shape[: value.dim() - len(spec.shape)]
    if spec.kind == "discrete":
        return one_hot(value.long().reshape(*lead, -1), spec.classes).transpose(-1, -2).flatten(-2)
    return symlog(value.float()).reshape(*lead, -1)


class ImageEncoder(nn.Module):
    """Kernel-5 convolutions, each followed by 2x2 max pooling, RMS norm over channels and SiLU."""

    def __init__(self, group: ImageGroup, depths: list[int], kernel: int) -> None:
        super().__init__()
        self.pad = (group.padded[1] - group.side[1], group.padded[0] - group.side[0])
        sizes = [sum(group.channels), *depths]
        self.conv = nn.ModuleList([Conv(a, b, kernel) for a, b in pairwise(sizes)])
        self.norm = nn.ModuleList([NormSilu(b) for b in depths])
        self.encode: Callable[..., Tensor] = encode  # how training passes are computed

    def forward(self, image: Tensor) -> Tensor:
        """Tokens [N, E] of uint8 images [N, H, W, C]."""
        if trainable(image):
            return self.encode(image, self.pad, self._levels()).flatten(1)
        return in_chunks(self.plain, image)

    def _levels(self) -> list[Level]:
        pairs = zip(self.conv, self.norm, strict=True)
        return [Level(conv.weight, conv.bias, norm.scale) for conv, norm in pairs]  # type: ignore[arg-type]

    def plain(self, image: Tensor) -> Tensor:
        """What `forward` computes, as the paper says it."""
        x = image.permute(0, 3, 1, 2).float() / 255.0 - 0.5  # [N, C, H, W], channels last in memory
        if any(self.pad):
            x = F.pad(x, (0, self.pad[0], 0, self.pad[1]))
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = over_channels(norm, F.max_pool2d(conv(x), 2))
        return x.permute(0, 2, 3, 1).flatten(1)


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` over the images of x [N, ...], on CPUs so many at a time that activations stay in cache."""
    if x.device.type != "cpu" or x.shape[0] <= CHUNK:
        return function(x)
    return torch.cat([function(part) for part in x.split(CHUNK)])


def over_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer of the last axis to the channels of [N, C, H, W]."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

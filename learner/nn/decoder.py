"""Features to predicted observations, with the loss of each key.

Vectors: symlog squared error; discrete entries: cross-entropy; images: squared error of a sigmoid output in
[0, 1], summed over pixels. Source: arXiv 2301.04104, "Network architecture"; numbers of the official code.
Letters: F feature width, N images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.nn.encoder import ImageGroup, flat_size, flatten, in_chunks, joined, over_channels, split_obs
from learner.nn.layers import MLP, BlockLinear, Conv, Linear, NormSilu
from learner.nn.twohot import symexp
from learner.nn.vision import Level, parity_fold, reconstruct, trainable
from system.specs import ArraySpec


class Decoder(nn.Module):
    """One MLP for all vector-like keys with a linear head each, one transposed CNN per image resolution."""

    def __init__(
        self,
        obs: Mapping[str, ArraySpec],
        *,
        deter: int,
        stoch: int,
        units: int,
        layers: int,
        depth: int,
        mults: tuple[int, ...],
        kernel: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.vectors, self.images = split_obs(obs, len(mults))
        if self.vectors:
            self.mlp = MLP(deter + stoch, units, layers)
            self.heads = nn.ModuleList([Linear(units, flat_size(s)) for s in self.vectors.values()])
        depths = [depth * mult for mult in mults]
        self.cnn = nn.ModuleList(
            [ImageDecoder(g, depths[-g.levels :], kernel, deter, stoch, units, blocks) for g in self.images]
        )
        self.deter = deter

    def compute_by(self, region: Callable[..., Tensor]) -> None:
        """From now on images of training passes go through `region`, see `learner.backends`."""
        for cnn in self.cnn:
            assert isinstance(cnn, ImageDecoder)
            cnn.reconstruct = region

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        """Raw output per key for feat [..., F].

        Vectors: symlog values [..., *shape]; discrete: logits [..., *shape, classes]; images: pixels in
        [0, 1], [..., H, W, C].
        """
        out = self._vector_outputs(feat)
        for group, cnn in zip(self.images, self.cnn, strict=True):
            pixels = cnn(feat.flatten(0, -2)).float()  # [N, H, W, C]
            pixels = pixels.view(*feat.shape[:-1], *pixels.shape[1:])
            out |= dict(zip(group.keys, pixels.split(group.channels, -1), strict=True))
        return out

    def _vector_outputs(self, feat: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if self.vectors:
            x = self.mlp(feat)
            for (key, spec), head in zip(self.vectors.items(), self.heads, strict=True):
                classes = (spec.classes,) if spec.kind == "discrete" else ()
                out[key] = head(x).float().view(*feat.shape[:-1], *spec.shape, *classes)
        return out

    def reconstruction(self, feat: Tensor, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss per key [...] of the outputs for feat [..., F]: `losses` of `forward`."""
        if not (self.images and trainable(feat)):
            return self.losses(self(feat), obs, feat.dim() - 1)
        out = self.losses(self._vector_outputs(feat), obs, feat.dim() - 1)
        for group, cnn in zip(self.images, self.cnn, strict=True):
            sums = cnn.errors(feat.flatten(0, -2), joined(obs, group).flatten(0, -4))  # type: ignore[operator]
            out |= dict(zip(group.keys, sums.view(*feat.shape[:-1], -1).unbind(-1), strict=True))
        return out

    def losses(self, raw: Mapping[str, Tensor], obs: Mapping[str, Tensor], lead: int) -> dict[str, Tensor]:
        """Loss per key, summed over the key's entries; `lead` leading axes remain."""
        out: dict[str, Tensor] = {}
        for key, value in raw.items():
            loss = self._loss(key, value, obs[key])
            out[key] = loss.reshape(*loss.shape[:lead], -1).sum(-1)
        return out

    def _loss(self, key: str, raw: Tensor, target: Tensor) -> Tensor:
        spec = self.vectors.get(key)
        if spec is None:
            return (raw - target.float() / 255.0).square()
        if spec.kind == "discrete":
            logits = raw.flatten(0, -2)  # [R, classes]
            return F.cross_entropy(logits, target.long().flatten(), reduction="none").view(target.shape)
        flat = flatten(target, spec)  # [..., entries]
        return (raw.reshape(flat.shape) - flat).square()

    def predictions(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw outputs in the units of the environment: pixels 0..255 (float), values, class indices."""
        out: dict[str, Tensor] = {}
        for key, value in raw.items():
            spec = self.vectors.get(key)
            if spec is None:
                out[key] = value * 255.0
            else:
                out[key] = value.argmax(-1) if spec.kind == "discrete" else symexp(value)
        return out


class ImageDecoder(nn.Module):
    """Block-linear map of deter plus an MLP of stoch onto a small grid, then repeat-up convolutions."""

    def __init__(
        self,
        group: ImageGroup,
        depths: list[int],
        kernel: int,
        deter: int,
        stoch: int,
        units: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.side, self.grid, self.blocks, self.deter = group.side, group.grid, blocks, deter
        self.channels = group.channels
        self.depth = depths[-1]
        assert self.depth % blocks == 0, (self.depth, blocks)
        size = group.grid[0] * group.grid[1] * self.depth
        self.from_deter = BlockLinear(deter, size, blocks)
        self.stoch_hidden = MLP(stoch, 2 * units, 1)
        self.from_stoch = Linear(2 * units, size)
        self.norm_in = NormSilu(self.depth)
        sizes = [*reversed(depths), sum(group.channels)]
        self.conv = nn.ModuleList([UpConv(a, b, kernel) for a, b in pairwise(sizes)])
        self.norm = nn.ModuleList([NormSilu(b) for b in sizes[1:-1]])
        self.reconstruct: Callable[..., Tensor] = reconstruct  # how training passes are computed

    def forward(self, feat: Tensor) -> Tensor:
        """Pixels [N, H, W, C] in [0, 1] for feat [N, F]."""
        return in_chunks(self.plain, self._maps(feat))

    def errors(self, feat: Tensor, image: Tensor) -> Tensor:
        """Squared errors [N, keys] summed over pixels, for feat [N, F] and uint8 images [N, H, W, C]."""
        norms = [*(norm.scale for norm in self.norm), None]
        levels = [Level(up.conv.weight, up.conv.bias, s) for up, s in zip(self.conv, norms, strict=True)]  # type: ignore[arg-type, union-attr]
        return self.reconstruct(self._maps(feat), image, self.channels, levels)

    def _maps(self, feat: Tensor) -> Tensor:
        """Small maps [N, h, w, C] from which the images grow."""
        height, width = self.grid
        spatial = self.from_deter(feat[:, : self.deter])  # [N, G * h * w * c]
        spatial = spatial.view(-1, self.blocks, height, width, self.depth // self.blocks)
        spatial = spatial.permute(0, 2, 3, 1, 4).reshape(-1, height, width, self.depth)
        hidden = self.from_stoch(self.stoch_hidden(feat[:, self.deter :]))
        return self.norm_in(spatial + hidden.view_as(spatial))

    def plain(self, x: Tensor) -> Tensor:
        """Pixels [N, H, W, C] grown from maps x [N, h, w, C]."""
        x = x.permute(0, 3, 1, 2)  # [N, C, h, w], channels last in memory
        for conv, norm in zip(self.conv[:-1], self.norm, strict=True):
            x = over_channels(norm, conv(x))
        x = torch.sigmoid(self.conv[-1](x))
        return x[:, :, : self.side[0], : self.side[1]].permute(0, 2, 3, 1)


class UpConv(nn.Module):
    """Repeat every pixel to 2x2, then convolve: computed at low resolution, exactly.

    An output pixel of either parity sees a 5x5 kernel that covers 3x3 low-resolution pixels, so each parity
    has a 3x3 kernel whose entries are sums of the original ones: 9/25 of the products, and no large
    intermediate image.
    """

    fold: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, kernel)
        self.register_buffer("fold", parity_fold(kernel), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, O, 2h, 2w]."""
        # Letters: a, b parities; y, x low-resolution offsets; k, l original kernel entries.
        weight = torch.einsum("ayk,bxl,ockl->oabcyx", self.fold, self.fold, self.conv.weight).flatten(0, 2)
        bias = self.conv.bias.repeat_interleave(4)
        return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=self.fold.shape[1] // 2), 2)

"""Image encoder and reconstruction by the compiled library: gradients as in `learner.nn.vision`.

Letters: N images, H, W sides, C channels, O outputs of a level, k side of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from learner.native.calls import Block, call, fields
from learner.native.library import library
from learner.nn import vision
from learner.nn.vision import Level, parity_fold

WIDEST = 64
"""Channels of a level up to which the library is faster than torch, whose convolutions want many."""


class _Encode(Block):
    _fields_ = fields(
        "int:images int:height int:width int:channels int:rows int:columns int:levels int:side int:threads",
        *("outputs", "image", "weight", "bias", "scale", "features", "pooled", "winner"),
    )


class _EncodeGrads(Block):
    _fields_ = fields("", "by_features", "sums")


class _Reconstruct(Block):
    _fields_ = fields(
        "int:images int:height int:width int:keys int:grid_height int:grid_width int:inputs int:levels "
        "int:side int:threads",
        *("outputs", "channels", "image", "maps", "weight", "bias", "scale", "errors", "raw", "slope"),
    )


class _ReconstructGrads(Block):
    _fields_ = fields("", "by_errors", "by_maps", "sums")


def encode(image: Tensor, pad: tuple[int, int], levels: Sequence[Level]) -> Tensor:
    """As `learner.nn.vision.encode`: last feature maps [N, h, w, O]."""
    if _wide(levels):
        return vision.encode(image, pad, levels)
    flat = [tensor for level in levels for tensor in level]
    return _Encoder.apply(image, pad, *flat)  # type: ignore[return-value]


def reconstruct(x: Tensor, image: Tensor, channels: Sequence[int], levels: Sequence[Level]) -> Tensor:
    """As `learner.nn.vision.reconstruct`: squared errors [N, keys]."""
    if _wide(levels):
        return vision.reconstruct(x, image, channels, levels)
    fold = parity_fold(levels[0].weight.shape[-1])
    flat: list[Tensor] = []
    for level in levels:
        # Letters: a, b parities; y, x low-resolution offsets; k, l entries of the kernel.
        weight = torch.einsum("ayk,bxl,ockl->abocyx", fold, fold, level.weight).flatten(0, 2)
        flat += [weight, level.bias.repeat(4), *([] if level.scale is None else [level.scale])]
    return _Reconstructor.apply(x, image, tuple(channels), *flat)  # type: ignore[return-value]


def _wide(levels: Sequence[Level]) -> bool:
    return max(max(level.weight.shape[:2]) for level in levels) > WIDEST


def _kinds(flat: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Weights, biases and scales of all levels, which come level by level."""
    return {kind: tuple(flat[at::3]) for at, kind in enumerate(("weight", "bias", "scale"))}


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().contiguous() for x in tensors]


def _parts(images: int) -> Iterator[int]:
    """Registers, one image in each lane, that each part takes for an entry of a map."""
    lanes, part = library().vision_lanes(), library().vision_part_images()
    for first in range(0, images, part):
        yield -(-min(part, images - first) // lanes) * lanes


def _kept(images: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Uninitialised memory by part for maps of `size` entries: blocks small enough for the heap to keep."""
    return tuple(torch.empty(size * lanes, dtype=dtype) for lanes in _parts(images))


def _sums(images: int, weights: Sequence[Tensor]) -> Tensor:
    """Uninitialised [parts, entries of all weights]."""
    return torch.empty(len(list(_parts(images))), sum(x.numel() for x in weights))


def _by_weights(sums: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the weights from those of every part, added in the order of parts."""
    shares = sums.sum(0).split([x.numel() for x in weights])
    return [share.view_as(x) for share, x in zip(shares, weights, strict=True)]


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, pad: tuple[int, int], *flat: Tensor) -> Tensor:
        image, weights, levels = image.contiguous(), _detached(flat), len(flat) // 3
        rows, columns = image.shape[1] + pad[1], image.shape[2] + pad[0]
        outputs = [bias.shape[0] for bias in weights[1::3]]
        size = sum((rows * columns >> 2 * n) * count for n, count in enumerate(outputs, 1))
        features = torch.empty(image.shape[0], rows >> levels, columns >> levels, outputs[-1])
        kept = *_kept(image.shape[0], size), *_kept(image.shape[0], size, torch.uint8)
        call(library().encode_forward, _encode_block(pad, image, features, weights, kept))
        ctx.save_for_backward(image, features, *weights, *kept)
        ctx.pad, ctx.count = pad, len(flat)
        return features

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        image, features, *others = ctx.saved_tensors
        weights, kept = others[: ctx.count], others[ctx.count :]
        sums = _sums(image.shape[0], weights)
        block = _EncodeGrads(by_features=grads[0].contiguous(), sums=sums)
        call(library().encode_backward, _encode_block(ctx.pad, image, features, weights, kept), block)
        return None, None, *_by_weights(sums, weights)


def _encode_block(
    pad: tuple[int, int], image: Tensor, features: Tensor, weights: Sequence[Tensor], kept: Sequence[Tensor]
) -> _Encode:
    """`kept`: pooled maps of all parts, then winners of all parts."""
    images, height, width, channels = image.shape
    kinds = _kinds(weights)
    return _Encode(
        images=images,
        height=height,
        width=width,
        channels=channels,
        rows=height + pad[1],
        columns=width + pad[0],
        levels=len(kinds["weight"]),
        side=weights[0].shape[-1],
        threads=torch.get_num_threads(),
        outputs=torch.tensor([bias.shape[0] for bias in kinds["bias"]]),
        image=image,
        features=features,
        pooled=tuple(kept[: len(kept) // 2]),
        winner=tuple(kept[len(kept) // 2 :]),
        **kinds,
    )


class _Reconstructor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, image: Tensor, channels: tuple[int, ...], *flat: Tensor) -> Tensor:
        image, (x, *weights) = image.contiguous(), _detached((x, *flat))
        images, pixels = x.shape[0], x.shape[1] * x.shape[2]
        *sizes, last = ((pixels << 2 * n) * bias.shape[0] for n, bias in enumerate(weights[1::3]))
        errors = torch.empty(images, len(channels))
        kept = *_kept(images, sum(sizes)), *_kept(images, last)
        call(library().reconstruct_forward, _reconstruct_block(channels, x, image, errors, weights, kept))
        ctx.save_for_backward(x, image, errors, *weights, *kept)
        ctx.channels, ctx.count = channels, len(flat)
        return errors

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, image, errors, *others = ctx.saved_tensors
        weights, kept = others[: ctx.count], others[ctx.count :]
        sums, by_maps = _sums(x.shape[0], weights), torch.empty_like(x)
        block = _ReconstructGrads(by_errors=grads[0].contiguous(), by_maps=by_maps, sums=sums)
        given = _reconstruct_block(ctx.channels, x, image, errors, weights, kept)
        call(library().reconstruct_backward, given, block)
        return by_maps, None, None, *_by_weights(sums, weights)


def _reconstruct_block(
    channels: tuple[int, ...],
    x: Tensor,
    image: Tensor,
    errors: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> _Reconstruct:
    """`kept`: results of all parts, then slopes of all parts."""
    kinds = _kinds(weights)
    return _Reconstruct(
        images=x.shape[0],
        height=image.shape[1],
        width=image.shape[2],
        keys=len(channels),
        grid_height=x.shape[1],
        grid_width=x.shape[2],
        inputs=x.shape[3],
        levels=len(kinds["weight"]),
        side=weights[0].shape[-1],
        threads=torch.get_num_threads(),
        outputs=torch.tensor([bias.shape[0] // 4 for bias in kinds["bias"]]),
        channels=torch.tensor(channels),
        image=image,
        maps=x,
        errors=errors,
        raw=tuple(kept[: len(kept) // 2]),
        slope=tuple(kept[len(kept) // 2 :]),
        **kinds,
    )

"""The convolutions of image encoder and decoder with their gradients written out, for training on CPUs.

Between the observations and `learner.nn.{encoder,decoder}`, whose plain code says the same under autograd and
is the oracle of the tests. Convolutions of a few channels are cheap; what costs is every pass over memory in
between. Hence: few images at a time on each thread, so that what one operation leaves the next finds in
cache; channels last, as the convolutions want them; norms by products with small block matrices, since sums
over eight channels and their spreading are slow as reductions and broadcasts; pixels shuffled in runs of
channels; the gradient of the image loss computed with the loss.

Where several of four pooled values are the largest, the gradient goes to the first row's, then the first
column's. Letters: N images, H, W sides of a level, C inputs, O outputs of a convolution, P pixels, r pixels
side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.lanes import run_lanes
from learner.nn.layers import ROOT_EPS

CHUNK = 64  # images of 64x64 pixels per pass: measured best; small maps make the calls count
LANES = 16  # float32 values of a vector register; convolutions to fewer channels leave some idle
MIDDLE = 127.5  # pixels are read as (pixel - 127.5) / 255
NORM_WIDTH = 64  # channels of pixels side by side, at most, in a product with a block matrix


class Level(NamedTuple):
    """One convolution of an encoder or decoder; scale is None after a decoder's last."""

    weight: Tensor  # [O, C, k, k]
    bias: Tensor  # [O]
    scale: Tensor | None  # [O]


def trainable(x: Tensor) -> bool:
    """Whether a training pass over x may go through this file."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def encode(image: Tensor, pad: tuple[int, int], levels: Sequence[Level]) -> Tensor:
    """Last feature maps [N, H, W, O] of uint8 images [N, H, W, C], zero-padded by (right, below).

    Each level: convolution, 2x2 max pooling, RMS norm over channels, SiLU.
    """
    flat = [tensor for level in levels for tensor in level]
    return _Encode.apply(image, pad, *flat)  # type: ignore[return-value]


def reconstruct(x: Tensor, image: Tensor, channels: Sequence[int], levels: Sequence[Level]) -> Tensor:
    """Squared errors [N, keys] of images grown from maps x [N, h, w, C], summed over each key's pixels.

    image [N, H, W, sum(channels)], uint8; what grows beyond it counts nothing. Each level but the last:
    repeat pixels to 2x2, convolution, RMS norm over channels, SiLU; the last has a sigmoid instead.
    """
    flat = [tensor for level in levels for tensor in level]
    return _Reconstruct.apply(x, image, tuple(channels), *flat)  # type: ignore[return-value]


def parity_fold(kernel: int) -> Tensor:
    """[2, r, kernel]: 1 where kernel entry k, seen from an output pixel of parity a, reads offset r."""
    return pair_fold(kernel).sum(1)


def pair_fold(kernel: int) -> Tensor:
    """[2, 2, r, kernel]: 1 where entry k, seen from parity a, reads the pixel of parity b of pair r."""
    reach = kernel // 2
    low = (reach + 1) // 2
    fold = torch.zeros(2, 2, 2 * low + 1, kernel)
    for parity in range(2):
        for entry in range(kernel):
            at = parity + entry - reach
            fold[parity, at % 2, at // 2 + low, entry] = 1.0
    return fold


class _Conv:
    """A convolution as computed: channels last, its weights folded by a constant linear map."""

    def __init__(self, fold: str, maps: Sequence[Tensor], level: Level, copies: int) -> None:
        """`fold`: einsum of maps and weight to [groups..., O, groups..., C, rows, columns], as "a,b->out"."""
        self._inputs, self._result = fold.split("->")
        self._maps = maps
        folded = torch.einsum(fold, *maps, level.weight)
        self._folded = folded.shape
        rows, columns = folded.shape[-2:]
        weight = folded.reshape(copies * level.weight.shape[0], -1, rows, columns)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = level.bias.repeat(copies)
        self.padding = [rows // 2, columns // 2]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, H, W, outputs] of x [N, H, W, inputs]."""
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=self.padding)
        return y.permute(0, 2, 3, 1).contiguous()

    def back(self, grad: Tensor, x: Tensor, to_input: bool) -> tuple[Tensor, Tensor]:
        """Gradients of x, which is nothing unless asked for, and of the weight as computed."""
        given = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), self.weight, None
        stride, dilation, groups, wanted = [1, 1], [1, 1], 1, [to_input, True, False]
        by_x, by_weight, _ = torch.ops.aten.convolution_backward(
            *given, stride, self.padding, dilation, False, [0, 0], groups, wanted
        )
        return by_x.permute(0, 2, 3, 1).contiguous() if to_input else grad[:0], by_weight

    def unfolded(self, weight: Tensor) -> Tensor:
        """Gradient of the level's weight from that of what is computed: the fold's transpose."""
        *maps, own = self._inputs.split(",")
        back = f"{','.join([*maps, self._result])}->{own}"
        return torch.einsum(back, *self._maps, weight.reshape(self._folded))


class _Norm:
    """RMS norm over channels and SiLU of pixels [P, O], r of them side by side in a row of a product."""

    def __init__(self, scale: Tensor, pixels: int) -> None:
        """`pixels` per image; r divides them."""
        size = scale.shape[0]
        fits = [r for r in (4, 2) if pixels % r == 0 and r * size <= NORM_WIDTH]
        self._side = fits[0] if fits else 1
        self._blocks = torch.eye(self._side).repeat_interleave(size, 0)  # [r * O, r], sums over channels
        self._mean = self._blocks / size
        scales = scale.repeat(self._side).unsqueeze(1)  # [r * O, 1]
        self._scaled_mean = self._mean * scales
        self._spread = (self._blocks * scales).t().contiguous()  # [r, r * O]
        self._flat_spread = self._blocks.t().contiguous()

    def before(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(y [..., O] normed and scaled, as rows [R, r * O]; inverses of the root mean squares [R, r])."""
        rows = y.view(-1, self._blocks.shape[0])
        inverse = torch.mm(rows * rows, self._mean).add_(ROOT_EPS**2).rsqrt_()
        return torch.mm(inverse, self._spread).mul_(rows), inverse

    def silu_back(self, grad: Tensor, y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of y and of the scale from that of the SiLU of what `before` returned."""
        rows = y.view(-1, self._blocks.shape[0])
        factor = torch.mm(inverse, self._spread)
        grad = torch.ops.aten.silu_backward(grad.reshape(rows.shape), factor * rows)
        product = grad * rows
        by_scale = torch.mm(product.t(), inverse).mul_(self._blocks).sum(1).view(self._side, -1).sum(0)
        along = torch.mm(product, self._scaled_mean).mul_(inverse**3)
        out = factor.mul_(grad).addcmul_(rows, torch.mm(along, self._flat_spread), value=-1.0)
        return out.view(y.shape), by_scale


def _bias_grad(grad: Tensor, outputs: int) -> Tensor:
    """Sum [O] of grad [N, H, W, r * O] over pixels: faster as a product than in the convolutions."""
    rows = grad.flatten(0, 1).flatten(1)  # [N * H, W * r * O]
    return torch.mv(rows.t(), rows.new_ones(rows.shape[0])).view(-1, outputs).sum(0)


def _pool(y: Tensor) -> tuple[Tensor, Tensor]:
    """(largest of each 2x2 pixels [N, H / 2, W / 2, O] of y [N, H, W, O], larger of each two rows)."""
    images, height, width, outputs = y.shape
    rows = y.view(images, height // 2, 2, width * outputs)
    taller = torch.maximum(rows[:, :, 0], rows[:, :, 1]).view(-1, 2, outputs)
    return torch.maximum(taller[:, 0], taller[:, 1]).view(images, height // 2, width // 2, outputs), taller


def _pool_back(grad: Tensor, y: Tensor, taller: Tensor) -> Tensor:
    """Gradient of y [N, H, W, O] from that of the first result of `_pool(y)`; ties go to the first entry."""
    grad = grad.view(-1, y.shape[3])
    by_taller, by_y = torch.empty_like(taller), torch.empty_like(y)
    # In short runs this operation branches, so it gets memory of its own there.
    second = torch.ops.aten.threshold_backward(grad, taller[:, 1] - taller[:, 0], 0.0)  # grad where > 0
    by_taller[:, 1] = second
    torch.sub(grad, second, out=by_taller[:, 0])
    rows = y.view(*y.shape[:1], y.shape[1] // 2, 2, -1)
    grad, (first, second) = by_taller.view_as(rows[:, :, 0]), by_y.view(rows.shape).unbind(2)
    lead = rows[:, :, 1] - rows[:, :, 0]
    torch.ops.aten.threshold_backward.grad_input(grad, lead, 0.0, grad_input=second)
    torch.sub(grad, second, out=first)
    return by_y


class _EncoderLevel:
    """Convolution, pooling, norm, SiLU; to few channels, two columns of pixels are convolved side by side."""

    def __init__(self, level: Level, pixels: int) -> None:
        kernel, self.outputs = level.weight.shape[-1], level.weight.shape[0]
        assert level.scale is not None
        self.copies = 2 if self.outputs < LANES else 1
        if self.copies == 2:
            # Letters: a, b columns of a pair; x pairs apart; k, l entries of the kernel.
            self.conv = _Conv("abxl,ockl->aobckx", [pair_fold(kernel)], level, 2)
        else:
            self.conv = _Conv("ockl->ockl", [], level, 1)
        self.norm = _Norm(level.scale, pixels)

    def _pairs(self, x: Tensor) -> Tensor:
        """Pixels x [N, H, W, C] as [N, H, W / 2, 2 C] where two columns are one: a view."""
        return x.view(*x.shape[:2], x.shape[2] // self.copies, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(features [N, H / 2, W / 2, O] of x [N, H, W, C], what `back` wants)."""
        y = self.conv(self._pairs(x)).view(*x.shape[:3], self.outputs)
        pooled, taller = _pool(y)
        before, inverse = self.norm.before(pooled)
        return F.silu(before, inplace=True).view(pooled.shape), (x, y, taller, pooled, inverse)

    def back(self, grad: Tensor, saved: Sequence[Tensor], to_input: bool) -> tuple[Tensor, ...]:
        """Gradients of x (nothing unless asked for), weight, bias and scale from that of the features."""
        x, y, taller, pooled, inverse = saved
        grad, by_scale = self.norm.silu_back(grad, pooled, inverse)
        by_y = self._pairs(_pool_back(grad, y, taller))
        by_x, by_weight = self.conv.back(by_y, self._pairs(x), to_input)
        by_bias = _bias_grad(grad, self.outputs)
        return by_x.view(x.shape) if to_input else by_x, by_weight, by_bias, by_scale


class _DecoderLevel:
    """Repeat to 2x2 and convolve at low resolution; norm and SiLU but for the last level."""

    def __init__(self, level: Level) -> None:
        fold = parity_fold(level.weight.shape[-1])
        self.outputs = level.weight.shape[0]
        # Letters: a, b parities; y, x low-resolution offsets; k, l entries of the kernel.
        self.conv = _Conv("ayk,bxl,ockl->abocyx", [fold, fold], level, 4)
        self.norm = None if level.scale is None else _Norm(level.scale, 4)

    def _shuffled(self, y: Tensor) -> Tensor:
        """[N, h, w, (a, b, O)] as [N, h, a, w, (b, O)], the pixels in their places: a view."""
        return y.unflatten(-1, (2, -1)).transpose(2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """([N, 2h, 2w, O] of x [N, h, w, C], what `back` wants)."""
        assert self.norm is not None
        y = self.conv(x)  # [N, h, w, 4 O]
        before, inverse = self.norm.before(y)
        out = self._shuffled(F.silu(before, inplace=True).view(y.shape)).contiguous()
        return out.view(x.shape[0], 2 * x.shape[1], 2 * x.shape[2], -1), (x, y, inverse)

    def back(self, grad: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of x, weight, bias and scale from that of the result."""
        assert self.norm is not None
        x, y, inverse = saved
        images, height, width, _ = x.shape
        grad = grad.view(images, height, 2, width, -1).transpose(2, 3)
        grad, by_scale = self.norm.silu_back(grad, y, inverse)
        return *self.conv_back(grad, x), by_scale

    def conv_back(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias from that of the convolution of x."""
        return *self.conv.back(grad, x, True), _bias_grad(grad, self.outputs)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, pad: tuple[int, int], *flat: Tensor) -> Tensor:
        height, width = image.shape[1] + pad[1], image.shape[2] + pad[0]
        levels = _encoder_levels(flat, height, width)

        def run(chunk: Tensor) -> tuple[Tensor, list[Tensor]]:
            x, saved = torch.sub(chunk, MIDDLE), []
            if any(pad):
                x = F.pad(x, (0, 0, 0, pad[0], 0, pad[1]))
            for level in levels:
                x, kept = level.forward(x)
                saved += kept
            return x, saved

        parts = run_lanes(run, image.split(CHUNK))
        ctx.save_for_backward(*flat, *(tensor for _, saved in parts for tensor in saved))
        ctx.sides, ctx.count = (height, width), len(flat)
        return torch.cat([x for x, _ in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        levels = _encoder_levels(flat, *ctx.sides)

        def run(part: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
            grad, kept = part
            found: list[Tensor] = []
            for at in reversed(range(len(levels))):
                grad, *by_weights = levels[at].back(grad, kept[5 * at : 5 * at + 5], at > 0)
                found = by_weights + found
            return found

        parts = run_lanes(run, _with_chunks(grads[0].split(CHUNK), saved))
        return (None, None, *_unfolded(levels, parts, 1.0 / 255.0))


def _with_chunks(chunks: Sequence[Tensor], saved: Sequence[Tensor]) -> list[tuple[Tensor, Sequence[Tensor]]]:
    """Each chunk with what was saved for it; as many tensors for each."""
    step = len(saved) // len(chunks)
    return [(chunk, saved[n * step : (n + 1) * step]) for n, chunk in enumerate(chunks)]


def _unfolded(
    levels: Sequence[_EncoderLevel | _DecoderLevel], parts: Sequence[Sequence[Tensor]], factor: float
) -> list[Tensor | None]:
    """Gradients of the levels' weights: the sum, in a fixed order, of those of all chunks.

    `factor`: what the first level's weight was multiplied with.
    """
    sums = iter([torch.stack(same).sum(0) for same in zip(*parts, strict=True)])
    out: list[Tensor | None] = []
    for level in levels:
        weight, bias = level.conv.unfolded(next(sums)), next(sums)
        out += [weight if out else weight * factor, bias, None if level.norm is None else next(sums)]
    return out


def _levels(flat: Sequence[Any]) -> list[Level]:
    return [Level(*flat[at : at + 3]) for at in range(0, len(flat), 3)]


def _encoder_levels(flat: Sequence[Any], height: int, width: int) -> list[_EncoderLevel]:
    """`height` and `width` of padded images. Pixels are not divided by 255: the first weights are."""
    first, *rest = _levels(flat)
    levels = [first._replace(weight=first.weight / 255.0), *rest]
    return [_EncoderLevel(level, (height * width) >> (2 * n)) for n, level in enumerate(levels, 1)]


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, image: Tensor, channels: tuple[int, ...], *flat: Any) -> Tensor:
        levels = [_DecoderLevel(level) for level in _levels(flat)]

        def run(part: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
            maps, saved = part[0].contiguous(), []
            for level in levels[:-1]:
                maps, kept = level.forward(maps)
                saved += kept
            pixels = levels[-1].conv(maps).sigmoid_()  # [N, h, w, 4 C]
            error, slope = _image_error(pixels, part[1])
            return _square_sums(error, channels), [*saved, maps, slope]

        parts = run_lanes(run, list(zip(x.split(CHUNK), image.split(CHUNK), strict=True)))
        ctx.save_for_backward(*flat, *(tensor for _, saved in parts for tensor in saved))
        ctx.channels, ctx.count = channels, len(flat)
        return torch.cat([sums for sums, _ in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        levels = [_DecoderLevel(level) for level in _levels(flat)]

        def run(part: tuple[Tensor, Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
            *kept, maps, slope = part[1]
            grad, *found = levels[-1].conv_back(_scaled(slope, part[0], ctx.channels), maps)
            for at in reversed(range(len(levels) - 1)):
                grad, *by_weights = levels[at].back(grad, kept[3 * at : 3 * at + 3])
                found = by_weights + found
            return grad, found

        parts = run_lanes(run, _with_chunks(grads[0].split(CHUNK), saved))
        by_weights = _unfolded(levels, [found for _, found in parts], 1.0)
        return (torch.cat([grad for grad, _ in parts]), None, None, *by_weights)


def _image_error(pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(error, gradient of half its square sum before the sigmoid) [N, h, w, (a, b, C)].

    pixels [N, h, w, (a, b, C)] in [0, 1]; target [N, H, W, C], uint8, H <= 2h and W <= 2w.
    """
    sides = 2 * pixels.shape[1], 2 * pixels.shape[2]
    error = torch.sub(pixels, _placed(target, sides).float(), alpha=1.0 / 255.0)
    if target.shape[1:3] != sides:
        error.mul_(_placed(torch.ones_like(target[:1]), sides))
    return error, torch.addcmul(pixels, pixels, pixels, value=-1.0).mul_(error)


def _placed(image: Tensor, sides: tuple[int, int]) -> Tensor:
    """uint8 image [N, H, W, C], zero-padded to `sides`, as [N, h, w, (a, b, C)]."""
    images, height, width, channels = image.shape
    if (height, width) != sides:
        image = F.pad(image, (0, 0, 0, sides[1] - width, 0, sides[0] - height))
    # Two bytes at a time: a pair of pixels has an even number of them.
    rows = image.reshape(images, sides[0] // 2, 2, sides[1] // 2, 2 * channels).view(torch.int16)
    return rows.transpose(2, 3).contiguous().view(torch.uint8).flatten(3)


def _square_sums(error: Tensor, channels: tuple[int, ...]) -> Tensor:
    """[N, keys] of error [N, h, w, (a, b, C)]."""
    if len(channels) == 1:
        return torch.linalg.vector_norm(error.flatten(1), dim=1, keepdim=True).square_()
    parts = error.unflatten(-1, (4, -1)).split(channels, -1)
    return torch.stack([part.square().sum((1, 2, 3, 4)) for part in parts], 1)


def _scaled(slope: Tensor, grad: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Gradient before the sigmoid [N, h, w, (a, b, C)] from that of the sums [N, keys]."""
    factor = 2.0 * grad  # [N, keys]
    if len(channels) > 1:
        factor = factor.repeat_interleave(torch.tensor(channels), 1).repeat(1, 4)  # [N, (a, b, C)]
    return slope * factor.view(factor.shape[0], 1, 1, -1)

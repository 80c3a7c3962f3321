"""Scalars as categories: symlog, and two-hot codes over symexp-spaced bins.

Source: arXiv 2301.04104, "Critic learning" and "Robust predictions". Letters: K bins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of symlog: sign(x) (exp(|x|) - 1)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class TwoHot(NamedTuple):
    """One evaluation of a two-hot head: logits [..., K] and what mean and loss share."""

    logits: Tensor  # [..., K]
    probs: Tensor  # [..., K], constant
    bins: Tensor  # [K]

    @classmethod
    def of(cls, logits: Tensor, bins: Tensor) -> TwoHot:
        return cls(logits, torch.softmax(logits.detach(), -1), bins)

    def mean(self) -> Tensor:
        """Expected value [...], constant.

        Mirrored bins are subtracted before the sum: bins reach 5e8, and a plain sum would turn a uniform
        distribution into a large number instead of zero.
        """
        half = self.bins.shape[0] // 2
        upper, lower = self.probs[..., 1 : half + 1], self.probs[..., half + 1 :]
        # Autocast would round probabilities, bins and the value itself to bfloat16: 0.4 % of a return.
        with torch.autocast(self.probs.device.type, enabled=False):
            return (upper - lower) @ self.bins[1 : half + 1]

    def loss(self, *targets: Tensor, scales: tuple[float, ...] = (1.0,)) -> Tensor:
        """Cross-entropy [...] towards each target [...], as a two-hot code, times its scale, summed."""
        index, weight = twohot(torch.stack(targets, -1), self.bins)  # [..., M, 2]
        if scales != (1.0,):  # number by number: a tensor made of them would be copied to the device
            parts = zip(weight.unbind(-2), scales, strict=True)
            weight = torch.stack([part if scale == 1.0 else part * scale for part, scale in parts], -2)
        return _SparseCrossEntropy.apply(self.logits, self.probs, index.flatten(-2), weight.flatten(-2))  # type: ignore[return-value]


def mirrored_bins(count: int, limit: float = 20.0) -> Tensor:
    """`count` (odd) bin positions [K], symexp of an even grid on +-limit, in the order zero, upper, lower.

    The order lets mirrored bins be subtracted without turning an axis around; logits have the same order.
    """
    assert count % 2 == 1, count
    upper = symexp(torch.linspace(0.0, limit, count // 2 + 1, dtype=torch.float32))
    return torch.cat([upper, -upper[1:]])


def twohot(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the neighbouring bins and their weights, each [..., 2]: target [...] in raw space.

    Beyond the outermost bins all weight goes to the outermost one. bins as from `mirrored_bins`.
    """
    half = bins.shape[0] // 2
    size = target.abs().contiguous()
    inner = torch.searchsorted(bins[: half + 1], size, right=True) - 1  # by magnitude, [...]
    index = torch.stack([inner, inner + 1], -1).clamp_(0, half)  # [..., 2]
    distance = (bins[index] - size.unsqueeze(-1)).abs()  # [..., 2]
    distance = torch.where((index[..., 0] == index[..., 1]).unsqueeze(-1), 1.0, distance)
    weight = distance.flip(-1) / distance.sum(-1, keepdim=True)
    # A target that is not finite must not pass for a large one: its weights, and the loss, become NaN.
    weight = weight + (target - target).unsqueeze(-1)
    mirrored = (target < 0).unsqueeze(-1) & (index > 0)
    return torch.where(mirrored, index + half, index), weight


class _SparseCrossEntropy(torch.autograd.Function):
    """-sum_m weight_m log softmax(logits)[index_m]; probs, index and weight are constants.

    The gradient is written out, weight_sum * probs - scattered weights: two passes over [..., K], not five.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(probs, index, weight)
        # The largest probability is at least 1 / K, so this logarithm cannot underflow.
        scale = logits.amax(-1) - probs.amax(-1).log()
        return weight.sum(-1) * scale - (weight * logits.gather(-1, index)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        probs, index, weight = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)  # [..., 1]
        out = probs * (weight.sum(-1, keepdim=True) * grad)
        return out.scatter_add_(-1, index, -weight * grad), None, None, None

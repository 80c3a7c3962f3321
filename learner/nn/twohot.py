"""Scalars as categories: symlog, and two-hot codes over symexp-spaced bins.

Source: arXiv 2301.04104, "Critic learning" and "Robust predictions". Letters: K bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of symlog: sign(x) (exp(|x|) - 1)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symexp_bins(count: int, limit: float = 20.0) -> Tensor:
    """`count` (odd) bin positions [K], exactly antisymmetric, symexp of an even grid on +-limit."""
    assert count % 2 == 1, count
    upper = symexp(torch.linspace(0.0, limit, count // 2 + 1, dtype=torch.float32))
    return torch.cat([-upper.flip(0)[:-1], upper])


def expectation(logits: Tensor, bins: Tensor) -> Tensor:
    """Mean [...] of the categorical over bins [K]; logits [..., K].

    Mirrored bins are subtracted before the sum: bins reach 5e8, and a plain sum would turn a uniform
    distribution into a large number instead of zero.
    """
    half = bins.shape[0] // 2
    probs = torch.softmax(logits, -1)  # [..., K]
    return (probs[..., half + 1 :] - probs[..., :half].flip(-1)) @ bins[half + 1 :]


def twohot(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring bin indices and weights, each [..., 2], that interpolate target [...] in raw space.

    Beyond the outermost bins all weight goes to the outermost one.
    """
    below = torch.searchsorted(bins, target.contiguous(), right=True) - 1
    index = torch.stack([below, below + 1], -1).clamp_(0, bins.shape[0] - 1)  # [..., 2]
    distance = (bins[index] - target.unsqueeze(-1)).abs()  # [..., 2]
    distance = torch.where((index[..., 0] == index[..., 1]).unsqueeze(-1), 1.0, distance)
    return index, distance.flip(-1) / distance.sum(-1, keepdim=True)


def sparse_cross_entropy(logits: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """-sum_m weight_m log softmax(logits)[index_m]; logits [..., K], index and weight [..., M].

    Several two-hot targets for the same logits are concatenated along M: one pass pays for all.
    """
    return _SparseCrossEntropy.apply(logits, index, weight)


class _SparseCrossEntropy(torch.autograd.Function):
    """Gradient written out, weight_sum * softmax - scattered weights: two passes over [..., K], not five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        scale = torch.logsumexp(logits, -1)  # [...]
        ctx.save_for_backward(logits, scale, index, weight)
        return weight.sum(-1) * scale - (weight * logits.gather(-1, index)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        logits, scale, index, weight = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)  # [..., 1]
        out = torch.exp(logits - scale.unsqueeze(-1)).mul_(weight.sum(-1, keepdim=True) * grad)
        return out.scatter_add_(-1, index, -weight * grad), None, None

"""Categorical distributions: uniform mixing, sampling from given uniforms, straight-through gradients, KL.

One uniform number per variable and the inverse of the cumulative distribution: cheaper than noise per
class, and the random numbers are inputs, so a step can be repeated exactly. Letters: C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mixed_probs(logits: Tensor, unimix: float) -> Tensor:
    """softmax(logits) mixed with `unimix` parts of the uniform distribution; [..., C], float32."""
    probs = torch.softmax(logits.float(), -1)
    return probs if unimix == 0.0 else probs * (1.0 - unimix) + unimix / logits.shape[-1]


def sample_index(probs: Tensor, uniform: Tensor) -> Tensor:
    """Class index [...] by inverse CDF; probs [..., C] (any positive scale), uniform [...] in [0, 1)."""
    cumulative = probs.cumsum(-1)
    # uniform * total < total, so the index never leaves the range, whatever the rounding of the sum.
    return (cumulative < uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)


def one_hot(index: Tensor, classes: int) -> Tensor:
    """Float one-hot [..., C] of index [...]."""
    out = torch.zeros((*index.shape, classes), device=index.device)
    return out.scatter_(-1, index.unsqueeze(-1), 1.0)


def sample_one_hot(probs: Tensor, uniform: Tensor) -> Tensor:
    """One-hot sample [..., C] whose gradient is that of probs (straight-through)."""
    sample = one_hot(sample_index(probs.detach(), uniform), probs.shape[-1])
    return straight_through(probs, sample) if probs.requires_grad else sample


def straight_through(probs: Tensor, value: Tensor) -> Tensor:
    """`value` forward, the gradient goes to probs unchanged."""
    return _StraightThrough.apply(probs, value)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, value: Tensor) -> Tensor:
        del ctx, probs
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def kl_divergence(probs: Tensor, log_probs: Tensor, log_other: Tensor) -> Tensor:
    """KL(p || q) summed over the S independent variables; each [..., S, C], result [...]."""
    return (probs * (log_probs - log_other)).sum((-2, -1))


def free_nats_kl(post: Tensor, prior: Tensor, free: float) -> tuple[Tensor, Tensor]:
    """Dynamics and representation losses [...] from mixed probabilities [..., S, C].

    dyn = max(free, KL(sg(post) || prior)), rep = max(free, KL(post || sg(prior))); the KL is summed
    over variables first and then compared with the free nats; arXiv 2301.04104, equation 3.
    """
    log_post, log_prior = post.log(), prior.log()
    dyn = kl_divergence(post.detach(), log_post.detach(), log_prior)
    rep = kl_divergence(post, log_post, log_prior.detach())
    return dyn.clamp_min(free), rep.clamp_min(free)


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats [...] of probs [..., C]."""
    return -(probs * probs.clamp_min(1e-38).log()).sum(-1)

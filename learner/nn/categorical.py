"""Categorical distributions: uniform mixing, sampling from given uniforms, straight-through gradients, KL.

The class axis is the second to last, [..., C, S]: on CPUs torch runs a softmax over a short last axis some
twenty times slower. One uniform number per variable and the inverse of the cumulative
distribution: cheaper than noise per class, and random numbers are inputs, so a step can be repeated exactly.

Letters: C classes, S independent variables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mix(soft: Tensor, unimix: float) -> Tensor:
    """Probabilities [..., C, S] mixed with `unimix` parts of the uniform distribution."""
    return soft if unimix == 0.0 else soft * (1.0 - unimix) + unimix / soft.shape[-2]


def mixed_probs(logits: Tensor, unimix: float) -> Tensor:
    """Softmax of logits [..., C, S] in float32, mixed with the uniform distribution."""
    return mix(torch.softmax(logits.float(), -2), unimix)


def sample_index(probs: Tensor, uniform: Tensor) -> Tensor:
    """Class index [..., S] by inverse CDF; probs [..., C, S], uniform [..., S] in [0, 1).

    The last class takes what the others leave, so no rounding of the sum can leave the range.
    """
    return (probs.cumsum(-2)[..., :-1, :] < uniform.unsqueeze(-2)).sum(-2)


def thresholds(uniform: Tensor, classes: int, unimix: float) -> Tensor:
    """[..., C - 1, S]: a sample by uniform [..., S] is behind class c where P(class <= c) is below the c-th.

    P is that of the softmax before its uniform mixing, which is in the thresholds: steps need not mix.
    """
    share = torch.arange(1, classes, device=uniform.device).unsqueeze(-1) * (unimix / classes)  # [C - 1, 1]
    return (uniform.unsqueeze(-2) - share) / (1.0 - unimix)


def one_hot(index: Tensor, classes: int) -> Tensor:
    """Float one-hot [..., C, S] of index [..., S]."""
    shape = (*index.shape[:-1], classes, index.shape[-1])
    return torch.zeros(shape, device=index.device).scatter_(-2, index.unsqueeze(-2), 1.0)


def sample_one_hot(soft: Tensor, uniform: Tensor, unimix: float = 0.0) -> Tensor:
    """One-hot sample [..., C, S] of `soft` mixed with the uniform distribution.

    Where gradients are recorded, they reach the mixed probabilities straight through.
    """
    probs = mix(soft, unimix)
    sample = one_hot(sample_index(probs.detach(), uniform), probs.shape[-2])
    return (
        _StraightThrough.apply(probs, sample) if probs.requires_grad and torch.is_grad_enabled() else sample
    )


class _StraightThrough(torch.autograd.Function):
    """The sample forward; its gradient goes to the probabilities unchanged."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, sample: Tensor) -> Tensor:
        del ctx, probs
        return sample.view_as(sample)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def free_nats_kl(post: Tensor, prior: Tensor, free: float) -> tuple[Tensor, Tensor]:
    """Dynamics and representation losses [...] from mixed probabilities [..., C, S].

    dyn = max(free, KL(sg(post) || prior)), rep = max(free, KL(post || sg(prior))); the KL is summed
    over variables first and then compared with the free nats; arXiv 2301.04104, equation 3.
    """
    log_post, log_prior = post.log(), prior.log()
    dyn = (post.detach() * (log_post.detach() - log_prior)).sum((-2, -1))
    rep = (post * (log_post - log_prior.detach())).sum((-2, -1))
    return dyn.clamp_min(free), rep.clamp_min(free)


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats [...] of probs [..., C, S], summed over variables."""
    return -(probs * probs.clamp_min(1e-38).log()).sum((-2, -1))

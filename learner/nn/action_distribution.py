"""Distributions over actions as pure functions of a network's outputs, with their gradients written out.

Source: arXiv 2301.04104, "Actor learning". `raw` is what the distribution keeps of the outputs: it is stored
with an imagined action. Letters: A action width, K discrete components, R width of raw, `...` leading axes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from learner.nn.categorical import one_hot, sample_index


class Categoricals(NamedTuple):
    """Independent categoricals; the action is the concatenation of their one-hots.

    raw: log-probabilities [..., A], normalised per component. noise: uniforms [..., K].
    """

    classes: tuple[int, ...]
    unimix: float  # share of the uniform distribution

    def raw(self, outputs: Tensor) -> Tensor:
        return torch.cat([self._log_probs(part) for part in outputs.float().split(self.classes, -1)], -1)

    def _log_probs(self, logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, -1)
        if self.unimix == 0.0:
            return log_probs
        return (log_probs.exp() * (1.0 - self.unimix) + self.unimix / logits.shape[-1]).log()

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        parts = zip(raw.exp().split(self.classes, -1), noise.split(1, -1), strict=True)
        return torch.cat([component(sample_index(p.unsqueeze(-1), u), p.shape[-1]) for p, u in parts], -1)

    def mode(self, raw: Tensor) -> Tensor:
        parts = raw.split(self.classes, -1)
        return torch.cat([component(p.argmax(-1, keepdim=True), p.shape[-1]) for p in parts], -1)

    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor:
        return (raw * action).sum(-1)

    def entropy(self, raw: Tensor) -> Tensor:
        return -(raw.exp() * raw).sum(-1)

    def gradient(self, raw: Tensor, action: Tensor, by_log_prob: Tensor, by_entropy: Tensor) -> Tensor:
        """Gradient [..., A] by the outputs; those by log-probability and entropy are [...]."""
        mixed = raw.exp()
        by_log_prob, by_entropy = by_log_prob.unsqueeze(-1), by_entropy.unsqueeze(-1)  # [..., 1]
        if self.unimix == 0.0:
            by_raw = action * by_log_prob - mixed * raw * by_entropy
            sums = [part.sum(-1, keepdim=True).expand_as(part) for part in by_raw.split(self.classes, -1)]
            return by_raw - mixed * torch.cat(sums, -1)
        # Through the logarithm, the mixing and the softmax of each component.
        by_mixed = (action / mixed * by_log_prob - (raw + 1.0) * by_entropy) * (1.0 - self.unimix)
        out = []
        for p, grad in zip(mixed.split(self.classes, -1), by_mixed.split(self.classes, -1), strict=True):
            soft = (p - self.unimix / p.shape[-1]) / (1.0 - self.unimix)
            weighted = soft * grad
            out.append(weighted - soft * weighted.sum(-1, keepdim=True))
        return torch.cat(out, -1)


class BoundedNormals(NamedTuple):
    """Independent normals with tanh mean and standard deviation in [min_std, max_std].

    raw: means, then deviations, [..., 2A]. noise: standard normals [..., A]. Samples are not squashed: the
    environment (and the model's input) clip them to [-1, 1].
    """

    min_std: float
    max_std: float

    def raw(self, outputs: Tensor) -> Tensor:
        mean, spread = outputs.float().chunk(2, -1)
        # Sigmoid of 2 and more: starts near the upper end, to explore first.
        std = self.min_std + (self.max_std - self.min_std) * torch.sigmoid(spread + 2.0)
        return torch.cat([torch.tanh(mean), std], -1)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        mean, std = raw.chunk(2, -1)
        return torch.addcmul(mean, std, noise)

    def mode(self, raw: Tensor) -> Tensor:
        return raw.chunk(2, -1)[0]

    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor:
        mean, std = raw.chunk(2, -1)
        return (-0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, raw: Tensor) -> Tensor:
        std = raw.chunk(2, -1)[1]
        return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def gradient(self, raw: Tensor, action: Tensor, by_log_prob: Tensor, by_entropy: Tensor) -> Tensor:
        """Gradient [..., 2A] by the outputs; those by log-probability and entropy are [...]."""
        mean, std = raw.chunk(2, -1)
        by_log_prob, by_entropy = by_log_prob.unsqueeze(-1), by_entropy.unsqueeze(-1)  # [..., 1]
        score = (action - mean) / std
        by_mean = by_log_prob * score / std
        by_std = (by_log_prob * (score.square() - 1.0) + by_entropy) / std
        width = self.max_std - self.min_std
        slope = (std - self.min_std) * (self.max_std - std) / width if width else torch.zeros_like(std)
        return torch.cat([by_mean * (1.0 - mean.square()), by_std * slope], -1)


ActionDistribution = Categoricals | BoundedNormals


def component(index: Tensor, classes: int) -> Tensor:
    """One-hot [..., classes] of one component's index [..., 1]."""
    return one_hot(index, classes).squeeze(-1)

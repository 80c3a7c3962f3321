"""Output heads: two-hot scalar, binary, and the action heads (discrete, multi-discrete, bounded normal).

Source: arXiv 2301.04104; numbers of the current official code. Letters: F feature width, A action width,
K discrete action components, `...` free leading axes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.nn.categorical import one_hot, sample_index
from learner.nn.layers import MLP, Linear
from learner.nn.twohot import TwoHot, mirrored_bins
from system.specs import ActionSpec


class TwoHotHead(nn.Module):
    """Scalar prediction as a categorical over symexp-spaced bins, starting at exactly zero."""

    bins: Tensor

    def __init__(self, inputs: int, units: int, layers: int, bins: int, outscale: float) -> None:
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.logits = Linear(self.mlp.outputs, bins, outscale)
        self.register_buffer("bins", mirrored_bins(bins), persistent=False)

    def forward(self, feat: Tensor) -> TwoHot:
        """Distribution over the bins for feat [..., F]."""
        return TwoHot.of(self.logits(self.mlp(feat)).float(), self.bins)


class BinaryHead(nn.Module):
    """One logit; used for continuation."""

    def __init__(self, inputs: int, units: int, layers: int) -> None:
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.logit = Linear(self.mlp.outputs, 1)

    def forward(self, feat: Tensor) -> Tensor:
        """Logit [...], float32, for feat [..., F]."""
        return self.logit(self.mlp(feat)).squeeze(-1).float()


class ActionHead(Protocol):
    """What a policy needs of its distribution. `raw` is the network output [..., R], action is [..., A]."""

    noise_width: int

    def __call__(self, feat: Tensor) -> Tensor: ...
    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor: ...
    def sample(self, raw: Tensor, noise: Tensor) -> Tensor: ...
    def mode(self, raw: Tensor) -> Tensor: ...
    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor: ...
    def entropy(self, raw: Tensor) -> Tensor: ...


class DiscreteActionHead(nn.Module):
    """Independent categoricals, one per action component; log-probabilities and entropies add up.

    The action is the concatenation of the components' one-hots.
    """

    def __init__(
        self, inputs: int, units: int, layers: int, classes: tuple[int, ...], outscale: float, unimix: float
    ) -> None:
        super().__init__()
        self.classes, self.unimix, self.noise_width = classes, unimix, len(classes)
        self.mlp = MLP(inputs, units, layers)
        self.logits = nn.ModuleList([Linear(self.mlp.outputs, n, outscale) for n in classes])

    def forward(self, feat: Tensor) -> Tensor:
        """Log-probabilities [..., A], float32, normalised per component, for feat [..., F]."""
        x = self.mlp(feat)
        return torch.cat([self._log_probs(head(x)) for head in self.logits], -1)

    def _log_probs(self, logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits.float(), -1)
        if self.unimix == 0.0:
            return log_probs
        return (log_probs.exp() * (1.0 - self.unimix) + self.unimix / logits.shape[-1]).log()

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniforms [*lead, K]."""
        return torch.rand((*lead, self.noise_width), generator=generator, device=generator.device)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Sampled action [..., A]."""
        parts = zip(raw.exp().split(self.classes, -1), noise.split(1, -1), strict=True)
        return torch.cat([_one_hot(sample_index(p.unsqueeze(-1), u), p.shape[-1]) for p, u in parts], -1)

    def mode(self, raw: Tensor) -> Tensor:
        """Most probable action [..., A]."""
        parts = raw.split(self.classes, -1)
        return torch.cat([_one_hot(p.argmax(-1, keepdim=True), p.shape[-1]) for p in parts], -1)

    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor:
        """Log-probability [...] of action [..., A]."""
        return (raw * action).sum(-1)

    def entropy(self, raw: Tensor) -> Tensor:
        """Entropy [...] in nats, summed over components."""
        return -(raw.exp() * raw).sum(-1)


class BoundedNormalHead(nn.Module):
    """Independent normals with tanh mean and standard deviation in [min_std, max_std].

    Samples are not squashed: the environment (and the model's input) clip them to [-1, 1].
    """

    def __init__(
        self, inputs: int, units: int, layers: int, size: int, outscale: float, min_std: float, max_std: float
    ) -> None:
        super().__init__()
        self.noise_width, self.min_std, self.max_std = size, min_std, max_std
        self.mlp = MLP(inputs, units, layers)
        self.mean = Linear(self.mlp.outputs, size, outscale)
        self.std = Linear(self.mlp.outputs, size, outscale)

    def forward(self, feat: Tensor) -> Tensor:
        """Mean and standard deviation [..., 2A], float32, for feat [..., F]."""
        x = self.mlp(feat)
        spread = torch.sigmoid(self.std(x).float() + 2.0)  # starts near the upper end: explore first
        std = self.min_std + (self.max_std - self.min_std) * spread
        return torch.cat([torch.tanh(self.mean(x).float()), std], -1)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normals [*lead, A]."""
        return torch.randn((*lead, self.noise_width), generator=generator, device=generator.device)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Sampled action [..., A]."""
        mean, std = raw.chunk(2, -1)
        return torch.addcmul(mean, std, noise)

    def mode(self, raw: Tensor) -> Tensor:
        """Mean action [..., A]."""
        return raw.chunk(2, -1)[0]

    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor:
        """Log-density [...] of action [..., A]."""
        mean, std = raw.chunk(2, -1)
        return (-0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, raw: Tensor) -> Tensor:
        """Differential entropy [...] in nats, summed over components."""
        std = raw.chunk(2, -1)[1]
        return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    """-target ln p - (1 - target) ln (1 - p); [...], soft targets allowed."""
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


def encode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Action of a row as models read it: [..., K] int -> concatenated one-hots [..., A]; floats unchanged."""
    if spec.kind == "continuous":
        return action.float()
    parts = [_one_hot(action[..., k : k + 1].long(), n) for k, n in enumerate(spec.classes)]
    return torch.cat(parts, -1)


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """One-hot [..., classes] of one component's index [..., 1]."""
    return one_hot(index, classes).squeeze(-1)


def decode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Inverse of `encode_action`: one-hots to int32 [..., K]; continuous actions are clipped to [-1, 1]."""
    if spec.kind == "continuous":
        return action.float().clamp(-1.0, 1.0)
    parts = [p.argmax(-1) for p in action.split(spec.classes, -1)]
    return torch.stack(parts, -1).int()

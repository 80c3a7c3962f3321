"""Output heads: two-hot scalar, binary, and the action heads (discrete, multi-discrete, bounded normal).

Source: arXiv 2301.04104; numbers of the current official code. Letters: F feature width, A action width,
K discrete action components, `...` free leading axes.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.nn.action_distribution import ActionDistribution, BoundedNormals, Categoricals, component
from learner.nn.imagine import Head, mlp_layers
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

    def weights(self) -> Head:
        """As the regions of imagination read them."""
        return Head(mlp_layers(self.mlp), self.logits.weight, self.logits.bias)


class BinaryHead(nn.Module):
    """One logit; used for continuation."""

    def __init__(self, inputs: int, units: int, layers: int) -> None:
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.logit = Linear(self.mlp.outputs, 1)

    def forward(self, feat: Tensor) -> Tensor:
        """Logit [...], float32, for feat [..., F]."""
        return self.logit(self.mlp(feat)).squeeze(-1).float()

    def weights(self) -> Head:
        """As the regions of imagination read them."""
        return Head(mlp_layers(self.mlp), self.logit.weight, self.logit.bias)


class ActionHead(Protocol):
    """What a policy needs of its distribution. `raw` is the network output [..., R], action is [..., A]."""

    noise_width: int

    def __call__(self, feat: Tensor) -> Tensor: ...
    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor: ...
    def sample(self, raw: Tensor, noise: Tensor) -> Tensor: ...
    def mode(self, raw: Tensor) -> Tensor: ...
    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor: ...
    def entropy(self, raw: Tensor) -> Tensor: ...


class _DistributionHead(nn.Module):
    """An action head: what its distribution can do, on the outputs of its network."""

    distribution: ActionDistribution

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Sampled action [..., A]."""
        return self.distribution.sample(raw, noise)

    def mode(self, raw: Tensor) -> Tensor:
        """Most probable action [..., A]."""
        return self.distribution.mode(raw)

    def log_prob(self, raw: Tensor, action: Tensor) -> Tensor:
        """Log-probability or log-density [...] of action [..., A]."""
        return self.distribution.log_prob(raw, action)

    def entropy(self, raw: Tensor) -> Tensor:
        """Entropy [...] in nats, summed over components."""
        return self.distribution.entropy(raw)


class DiscreteActionHead(_DistributionHead):
    """Independent categoricals, one per action component; log-probabilities and entropies add up."""

    def __init__(
        self, inputs: int, units: int, layers: int, classes: tuple[int, ...], outscale: float, unimix: float
    ) -> None:
        super().__init__()
        self.distribution, self.noise_width = Categoricals(classes, unimix), len(classes)
        self.mlp = MLP(inputs, units, layers)
        self.logits = nn.ModuleList([Linear(self.mlp.outputs, n, outscale) for n in classes])

    def forward(self, feat: Tensor) -> Tensor:
        """Log-probabilities [..., A], float32, normalised per component, for feat [..., F]."""
        x = self.mlp(feat)
        return self.distribution.raw(torch.cat([head(x) for head in self.logits], -1))

    def weights(self) -> Head:
        """All components' outputs as one affine map."""
        parts = [(head.weight, head.bias) for head in self.logits]
        weight, bias = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return Head(mlp_layers(self.mlp), weight, bias)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniforms [*lead, K]."""
        return torch.rand((*lead, self.noise_width), generator=generator, device=generator.device)


class BoundedNormalHead(_DistributionHead):
    """Independent normals with tanh mean and standard deviation in [min_std, max_std]."""

    def __init__(
        self, inputs: int, units: int, layers: int, size: int, outscale: float, min_std: float, max_std: float
    ) -> None:
        super().__init__()
        self.distribution, self.noise_width = BoundedNormals(min_std, max_std), size
        self.mlp = MLP(inputs, units, layers)
        self.mean = Linear(self.mlp.outputs, size, outscale)
        self.std = Linear(self.mlp.outputs, size, outscale)

    def forward(self, feat: Tensor) -> Tensor:
        """Mean and standard deviation [..., 2A], float32, for feat [..., F]."""
        x = self.mlp(feat)
        return self.distribution.raw(torch.cat([self.mean(x), self.std(x)], -1))

    def weights(self) -> Head:
        """Mean and deviation as one affine map."""
        weight = torch.cat([self.mean.weight, self.std.weight])
        return Head(mlp_layers(self.mlp), weight, torch.cat([self.mean.bias, self.std.bias]))

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normals [*lead, A]."""
        return torch.randn((*lead, self.noise_width), generator=generator, device=generator.device)


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    """-target ln p - (1 - target) ln (1 - p); [...], soft targets allowed."""
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


def encode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Action of a row as models read it: [..., K] int -> concatenated one-hots [..., A]; floats unchanged."""
    if spec.kind == "continuous":
        return action.float()
    parts = [component(action[..., k : k + 1].long(), n) for k, n in enumerate(spec.classes)]
    return torch.cat(parts, -1)


def decode_action(action: Tensor, spec: ActionSpec) -> Tensor:
    """Inverse of `encode_action`: one-hots to int32 [..., K]; continuous actions are clipped to [-1, 1]."""
    if spec.kind == "continuous":
        return action.float().clamp(-1.0, 1.0)
    parts = [p.argmax(-1) for p in action.split(spec.classes, -1)]
    return torch.stack(parts, -1).int()

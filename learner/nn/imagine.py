"""Imagination: the prior rolled forward under the policy, and every head read where the states are.

A pure function of weights, starts and random numbers, without gradients; `actor_critic` takes what it
returns. `reference_imagine` is the same computation plainly written and the oracle of its tests.

Letters: N trajectories, H steps, D deter, S variables, C classes, Z = C*S, F = D + Z, U units of any hidden
layer, G blocks, d = D / G, A action width, R width of the policy's `raw`, W noise width, K bins.
Axes: time first, so that the states of one step are contiguous rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.nn.action_distribution import ActionDistribution
from learner.nn.bptt import CoreWeights, core_step
from learner.nn.categorical import mixed_probs, sample_one_hot
from learner.nn.layers import MLP, rms_norm
from learner.nn.twohot import TwoHot


class Layer(NamedTuple):
    """Linear, RMS norm, SiLU."""

    weight: Tensor  # [U, I]
    bias: Tensor  # [U]
    scale: Tensor  # [U]


class Head(NamedTuple):
    """Hidden layers and an affine output."""

    layers: tuple[Layer, ...]
    weight: Tensor  # [O, U]
    bias: Tensor  # [O]


class DynamicsWeights(NamedTuple):
    """Core and prior of an RSSM."""

    core: CoreWeights
    action: Layer  # [U, A], embeds the action
    driver: Tensor  # [D, U], hidden layer of the core from the embedded action
    bias: Tensor  # [D], of the hidden layer
    prior: Head  # reads deter; O = Z
    unimix: float


class HeadWeights(NamedTuple):
    """Everything that reads feat [F]; all first layers have the same width."""

    actor: Head  # O: what `ActionDistribution.raw` reads
    critic: Head  # O = K
    slow: Head  # O = K
    reward: Head  # O = K
    cont: Head  # O = 1


class Starts(NamedTuple):
    """Where imagination begins, and its random numbers."""

    deter: Tensor  # [N, D]
    stoch: Tensor  # [N, C, S], one-hot
    action_noise: Tensor  # [N, H, W]
    stoch_noise: Tensor  # [N, H, S], uniform


class Imagined(NamedTuple):
    """N trajectories; row 0 is the start. Missing is what no loss reads: policy at the end, reward at 0."""

    feat: Tensor  # [H + 1, N, F]
    action: Tensor  # [H, N, A], chosen in state h
    raw: Tensor  # [H, N, R], the policy in state h
    reward: Tensor  # [H, N], on arriving at state h + 1
    cont: Tensor  # [H + 1, N], probability times discount
    value: Tensor  # [H + 1, N]
    slow: Tensor  # [H, N], value by the slow critic


def mlp_layers(mlp: MLP) -> tuple[Layer, ...]:
    """The layers of a module."""
    parts = dict(mlp.named_parameters())
    names = ("linear.{}.weight", "linear.{}.bias", "norm.{}.scale")
    return tuple(Layer(*(parts[name.format(i)] for name in names)) for i in range(len(mlp.linear)))


def hidden(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """Output [..., U] of the hidden layers for x [..., I]."""
    for layer in layers:
        x = F.silu(rms_norm(F.linear(x, layer.weight, layer.bias), layer.scale))
    return x


def outputs(x: Tensor, head: Head) -> Tensor:
    """Output [..., O] of a head for x [..., I]; float32."""
    return F.linear(hidden(x, head.layers), head.weight, head.bias).float()


@torch.no_grad()
def reference_imagine(
    starts: Starts, dynamics: DynamicsWeights, heads: HeadWeights, policy: ActionDistribution, bins: Tensor
) -> Imagined:
    """`imagine` as a plain loop over steps, then over heads; bins [K] as from `mirrored_bins`."""
    deter, stoch = starts.deter, starts.stoch
    feats, actions, raws = [torch.cat([deter, stoch.flatten(1)], -1)], [], []
    for h in range(starts.action_noise.shape[1]):
        raw = policy.raw(outputs(feats[-1], heads.actor))  # [N, R]
        action = policy.sample(raw, starts.action_noise[:, h])  # [N, A]
        embedded = hidden(action / action.abs().clamp_min(1.0), (dynamics.action,))
        drive = F.linear(embedded, dynamics.driver, dynamics.bias)  # [N, D]
        deter = core_step(deter, stoch.flatten(1), drive, dynamics.core).deter
        logits = outputs(deter, dynamics.prior).view_as(stoch)  # [N, C, S]
        stoch = sample_one_hot(mixed_probs(logits, dynamics.unimix), starts.stoch_noise[:, h])
        feats.append(torch.cat([deter, stoch.flatten(1)], -1))
        actions.append(action)
        raws.append(raw)
    feat = torch.stack(feats)  # [H + 1, N, F]
    return Imagined(
        feat=feat,
        action=torch.stack(actions),
        raw=torch.stack(raws),
        reward=TwoHot.of(outputs(feat[1:], heads.reward), bins).mean(),
        cont=torch.sigmoid(outputs(feat, heads.cont).squeeze(-1)),
        value=TwoHot.of(outputs(feat, heads.critic), bins).mean(),
        slow=TwoHot.of(outputs(feat[:-1], heads.slow), bins).mean(),
    )

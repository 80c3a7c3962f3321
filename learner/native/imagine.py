"""Imagination by the compiled library: same contract as `learner.nn.imagine`.

Letters: see `learner.nn.imagine`; V units of the heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learner.native.calls import Block, call, fields
from learner.native.library import library
from learner.nn.action_distribution import ActionDistribution, Categoricals
from learner.nn.bptt import CoreWeights
from learner.nn.imagine import DynamicsWeights, Head, HeadWeights, Imagined, Starts

CHUNK = 64
"""Trajectories whose states and heads stay in one core's cache."""
HEADS = ("reward", "cont", "critic", "actor", "slow")


class Traces(NamedTuple):
    """What `actor_critic` wants."""

    kept: tuple[Tensor, ...]  # per level, the layers of critic and actor before their norms: [H, N, 2V or V]


class _Imagine(Block):
    _fields_ = fields(
        "int:trajectories int:horizon int:deter int:stoch int:classes int:hidden int:blocks int:threads "
        "int:chunk int:units int:bins int:prior_layers int:reward_layers int:cont_layers int:critic_layers "
        "int:actor_layers int:slow_layers int:policy_kind int:width int:outputs int:noise int:components "
        "float:unimix float:policy_unimix float:min_std float:max_std",
        *("component_classes", "deter_start", "stoch_start", "action_noise", "stoch_noise", "positions"),
        *CoreWeights._fields,
        *("action_in", "action_bias", "action_scale", "driver", "hidden_bias", "prior", *HEADS),
        *("feat", "action", "raw", "out_reward", "out_cont", "value", "out_slow", "kept"),
    )


def tensors(head: Head) -> tuple[Tensor, ...]:
    """Tensors of a head in the library's order: weight, bias, scale of each layer, then the output's."""
    return (*(tensor for layer in head.layers for tensor in layer), head.weight, head.bias)


def _constants(head: Head) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors(head))


def policy_fields(policy: ActionDistribution) -> dict[str, int | float | Tensor]:
    """Fields that describe an action distribution."""
    if isinstance(policy, Categoricals):
        classes, unimix, low, high = policy.classes, policy.unimix, 0.0, 0.0
    else:
        classes, unimix, low, high = (), 0.0, policy.min_std, policy.max_std
    return {
        "policy_kind": int(isinstance(policy, Categoricals)),
        "components": len(classes),
        "component_classes": torch.tensor(classes, dtype=torch.int64),
        "policy_unimix": unimix,
        "min_std": low,
        "max_std": high,
    }


def _allocate(starts: Starts, heads: HeadWeights, width: int) -> tuple[Imagined, Traces]:
    count, horizon = starts.action_noise.shape[:2]
    feat = starts.deter.shape[1] + starts.stoch[0].numel()
    imagined = Imagined(
        feat=torch.empty(horizon + 1, count, feat),
        action=torch.empty(horizon, count, width),
        raw=torch.empty(horizon, count, heads.actor.bias.shape[0]),
        reward=torch.empty(horizon, count),
        cont=torch.empty(horizon + 1, count),
        value=torch.empty(horizon + 1, count),
        slow=torch.empty(horizon, count),
    )
    depths, units = (len(heads.critic.layers), len(heads.actor.layers)), heads.critic.layers[0].bias.shape[0]
    widths = [sum(level < depth for depth in depths) * units for level in range(max(depths))]
    return imagined, Traces(tuple(torch.empty(horizon, count, w) for w in widths))


@torch.no_grad()
def imagine(
    starts: Starts,
    dynamics: DynamicsWeights,
    heads: HeadWeights,
    policy: ActionDistribution,
    bins: Tensor,
    into: tuple[Imagined, Traces] | None = None,
) -> tuple[Imagined, Traces]:
    """As `learner.nn.imagine_rows.imagine`, memory of an earlier call with the same shapes included."""
    count, horizon = starts.action_noise.shape[:2]
    classes, variables = starts.stoch.shape[1:]
    imagined, traces = into or _allocate(starts, heads, dynamics.action.weight.shape[1])
    call(
        library().imagine,
        _Imagine(
            trajectories=count,
            horizon=horizon,
            deter=starts.deter.shape[1],
            stoch=variables,
            classes=classes,
            hidden=dynamics.action.bias.shape[0],
            blocks=dynamics.core.own.shape[0],
            threads=torch.get_num_threads(),
            chunk=CHUNK,
            units=heads.critic.layers[0].bias.shape[0],
            bins=bins.shape[0],
            prior_layers=len(dynamics.prior.layers),
            width=imagined.action.shape[2],
            outputs=imagined.raw.shape[2],
            noise=starts.action_noise.shape[2],
            unimix=dynamics.unimix,
            **policy_fields(policy),
            deter_start=starts.deter.contiguous(),
            stoch_start=starts.stoch.contiguous(),
            action_noise=starts.action_noise.contiguous(),
            stoch_noise=starts.stoch_noise.contiguous(),
            positions=bins.contiguous(),
            **{name: x.contiguous() for name, x in dynamics.core._asdict().items()},
            action_in=dynamics.action.weight.contiguous(),
            action_bias=dynamics.action.bias,
            action_scale=dynamics.action.scale,
            driver=dynamics.driver.contiguous(),
            hidden_bias=dynamics.bias,
            prior=_constants(dynamics.prior),
            **{name: _constants(getattr(heads, name)) for name in HEADS},
            **{f"{name}_layers": len(getattr(heads, name).layers) for name in HEADS},
            feat=imagined.feat,
            action=imagined.action,
            raw=imagined.raw,
            out_reward=imagined.reward,
            out_cont=imagined.cont,
            value=imagined.value,
            out_slow=imagined.slow,
            kept=traces.kept,
        ),
    )
    return imagined, traces

"""Losses of actor and critic by the compiled library: same contract as `learner.nn.actor_critic`.

Letters: see `learner.nn.imagine`; R = H*N imagined rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learner.native.calls import Block, call, fields
from learner.native.imagine import Traces, policy_fields, tensors
from learner.native.library import library
from learner.nn.action_distribution import ActionDistribution
from learner.nn.actor_critic import Factors, Losses, Targets
from learner.nn.imagine import HeadWeights, Imagined


class _ActorCritic(Block):
    _fields_ = fields(
        "int:rows int:starts int:feat_size int:units int:bins int:threads int:critic_layers int:actor_layers "
        "int:policy_kind int:width int:outputs int:components float:policy_unimix float:min_std "
        "float:max_std float:policy_factor float:value_factor float:replay_factor float:entropy_factor "
        "float:slow_factor",
        *("component_classes", "positions", "critic", "actor", "feat", "action", "raw", "slow", "kept"),
        *("returns", "advantage", "weight", "replay_returns", "replay_weight"),
        *("losses", "by_feat", "critic_grads", "actor_grads"),
    )


def actor_critic(
    feat: Tensor,
    imagined: Imagined,
    traces: Traces,
    targets: Targets,
    heads: HeadWeights,
    policy: ActionDistribution,
    bins: Tensor,
    factors: Factors,
) -> tuple[Tensor, Losses]:
    """As `learner.nn.actor_critic.actor_critic`; `traces` is what `learner.native.imagine.imagine` left."""
    critic, actor = tensors(heads.critic), tensors(heads.actor)
    given = (imagined, traces, targets, policy, bins, factors)
    total, *losses = _Native.apply(feat, given, len(critic), *critic, *actor)  # type: ignore[misc]
    return total, Losses(*losses)


class _Native(torch.autograd.Function):
    """The forward pass already has the gradients: the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, given: tuple[Any, ...], depth: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        imagined, traces, targets, policy, bins, factors = given
        critic = tuple(w.detach().contiguous() for w in weights[:depth])
        actor = tuple(w.detach().contiguous() for w in weights[depth:])
        by_feat, losses = torch.empty(feat.shape), torch.empty(4)
        grads = tuple(torch.empty(w.shape) for w in weights)
        call(
            library().actor_critic,
            _ActorCritic(
                rows=targets.weight.numel(),
                starts=feat.shape[0],
                feat_size=feat.shape[1],
                units=critic[1].shape[0],
                bins=bins.shape[0],
                threads=torch.get_num_threads(),
                critic_layers=depth // 3,
                actor_layers=len(actor) // 3,
                width=imagined.action.shape[-1],
                outputs=imagined.raw.shape[-1],
                **policy_fields(policy),
                policy_factor=factors.policy,
                value_factor=factors.value,
                replay_factor=factors.replay_value,
                entropy_factor=factors.entropy,
                slow_factor=factors.slow,
                positions=bins.contiguous(),
                critic=critic,
                actor=actor,
                feat=imagined.feat,
                action=imagined.action,
                raw=imagined.raw,
                slow=imagined.slow,
                kept=traces.kept,
                **{name: x.detach().contiguous() for name, x in targets._asdict().items()},
                losses=losses,
                by_feat=by_feat,
                critic_grads=grads[:depth],
                actor_grads=grads[depth:],
            ),
        )
        ctx.grads = (by_feat, *grads)
        parts = Losses(*losses.unbind())
        total = factors.policy * parts.policy + factors.value * parts.value
        total = total + factors.replay_value * parts.replay_value
        ctx.mark_non_differentiable(*parts)
        return total, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        scaled = ctx.grads if grads[0].item() == 1.0 else tuple(grad * grads[0] for grad in ctx.grads)
        return scaled[0], None, None, *scaled[1:]

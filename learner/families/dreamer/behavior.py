"""The DreamerV3 behavior: actor and critic learned in imagination, critic also on replayed rows.

The world model is a constant here: imagination runs without gradients, the actor learns by REINFORCE for both
kinds of action, and the only gradient into the world model is that of the replay value loss.
Source: arXiv 2301.04104, "Critic learning" and "Actor learning"; numbers of the current official code.
Letters: B batch, T time, K trailing rows used as starts, N = B*K, H horizon, A action, F feature width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.backends import TORCH, Backend
from learner.distributed import rank_count
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.world_model import DreamerWorldModel
from learner.health.signals import value_signals
from learner.interfaces import Capability, LossOut, Mode, Rollout, Tree
from learner.nn.actor_critic import Factors, Targets
from learner.nn.heads import BoundedNormalHead, DiscreteActionHead, TwoHotHead
from learner.nn.imagine import HeadWeights, Imagined, Starts
from learner.nn.twohot import TwoHot
from learner.returns import ReturnRange, imagination_weights, lambda_return
from system.specs import ActionSpec


def make_actor(
    config: DreamerConfig, feat: int, action: ActionSpec
) -> DiscreteActionHead | BoundedNormalHead:
    """The policy network of a config; the same on learner and actors."""
    units, layers, outscale = config.units, config.actor_layers, config.actor_outscale
    if action.kind == "discrete":
        return DiscreteActionHead(feat, units, layers, action.classes, outscale, config.actor_unimix)
    return BoundedNormalHead(feat, units, layers, action.size, outscale, config.min_std, config.max_std)


class _Aims(NamedTuple):
    """What the losses compare with, and their weights; constants."""

    returns: Tensor  # [N, H]
    scale: Tensor  # [], of the advantage
    advantage: Tensor  # [N, H]
    reached: Tensor  # [N, H], probability that a row still counts
    weight: Tensor  # [N, H], of a row's losses in a sum
    replay_returns: Tensor  # [B, K]
    live: Tensor  # [B, K], 1 where a replayed row has a return
    replay_weight: Tensor  # [B, K]


class _Found(NamedTuple):
    """One evaluation of all losses; N and H in either order."""

    aims: _Aims
    policy: Tensor  # []
    critic: Tensor  # []
    replay: Tensor  # []
    entropy: Tensor  # [], of the policy
    reward: Tensor  # [N, H]
    cont: Tensor  # [N, H + 1]
    value: Tensor  # [N, H + 1]
    replay_value: Tensor  # [N]
    total: Tensor | None = None  # [], where the losses themselves have no gradient


class ActorCritic(nn.Module):
    """Implements learner.interfaces.Behavior."""

    needs: frozenset[Capability] = frozenset({"step", "reward", "cont"})
    actor_keys = ("encoder.", "rssm.core.", "rssm.posterior.", "actor.")

    def __init__(self, config: DreamerConfig, feat: int, action: ActionSpec) -> None:
        super().__init__()
        self.horizon, self.starts = config.horizon, config.imagination_starts
        self.discount = 1.0 - 1.0 / config.discount_horizon
        self.lambda_, self.entropy, self.scales = config.lambda_, config.entropy, config.scales
        self.slow_rate, self.slow_weight = config.slow_rate, config.slow_weight
        self.row_error = False  # True: rows["error"] of a loss tells how wrong the value of each row was
        self.actor = make_actor(config, feat, action)
        self.critic = TwoHotHead(feat, config.units, config.critic_layers, config.bins, 0.0)
        self.slow = TwoHotHead(feat, config.units, config.critic_layers, config.bins, 0.0)
        self.slow.requires_grad_(requires_grad=False)
        self.backend: Backend = TORCH
        self._kept: tuple[Imagined, Any] | None = None  # what the backend's last imagination returned
        self.returns = ReturnRange(
            config.return_rate, config.return_low, config.return_high, config.return_floor
        )

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"main": [p for p in self.parameters() if p.requires_grad]}

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        """Accept the newest return range and let the slow critic follow; not when applied [] is False."""
        self.returns.accept(applied)
        rate = applied * self.slow_rate
        for slow, fast in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, rate)

    def trailing(self, batch: int, time: int) -> int:
        """Rows K at the end of each sequence from which to imagine; at least 2, for one replay return."""
        return time if self.starts == 0 else min(time, max(2, self.starts // batch))

    def noise(self, batch: int, time: int, generator: torch.Generator) -> Tree:
        """Action noise [N, H, *]; the model's noise for N trajectories of H steps is drawn by the agent."""
        return {"action": self.actor.noise((batch * self.trailing(batch, time), self.horizon), generator)}

    def act(self, feat: Tensor, noise: Tensor, mode: Mode) -> Tensor:
        """Action [..., A] for feat [..., F]: sampled in training, the distribution's mode in evaluation."""
        raw = self.actor(feat)
        return self.actor.sample(raw, noise) if mode == "train" else self.actor.mode(raw)

    def loss(self, model: object, batch: Tree, states: Tree, noise: Tree) -> LossOut:
        """Actor, critic and replay-value losses from posterior `states` [B, T, ...] of `model`.

        batch: reward, is_last, is_terminal [B, T]; optional weight [B], a factor on the losses of each
        sequence and of what is imagined from it. rows: error [B, K] when `row_error` is set.
        """
        time = states["feat"].shape[1]
        last = self.trailing(states["feat"].shape[0] * rank_count(), time)
        feat = states["feat"][:, time - last :].flatten(0, 1)  # [N, F]
        starts = {k: states[k][:, time - last :].detach().flatten(0, 1) for k in ("deter", "stoch")}
        tail = {k: batch[k][:, time - last :] for k in ("reward", "is_last", "is_terminal")}
        # Autocast has no part in regions: in bfloat16 the modules themselves are run.
        if isinstance(model, DreamerWorldModel) and not torch.is_autocast_enabled(feat.device.type):
            found = self._by_regions(model, starts, tail, feat, noise, batch.get("weight"))
        else:
            found = self._by_modules(model, starts, tail, feat, noise, batch.get("weight"))
        aims, scales = found.aims, self.scales
        metrics = {
            "loss/policy": found.policy.detach(),
            "loss/value": found.critic.detach(),
            "loss/replay_value": found.replay.detach(),
            "entropy/policy": found.entropy.detach(),
            "imagined/return": aims.returns.mean(),
            "imagined/return_scale": aims.scale,
            "imagined/return_range": self.returns.pending[1] - self.returns.pending[0],
            "imagined/reward": found.reward.mean(),
            "imagined/cont": found.cont.mean(),
            "imagined/value": found.value.mean(),
            "imagined/weight": aims.reached.mean(),
            "imagined/advantage": aims.advantage.abs().mean(),
        }
        value = found.replay_value.view_as(aims.replay_returns)
        metrics |= value_signals(value, aims.replay_returns, aims.live)
        rows = {"error": aims.live * (value - aims.replay_returns).abs()} if self.row_error else {}
        total = found.total
        if total is None:
            total = scales.policy * found.policy + scales.value * found.critic
            total = total + scales.replay_value * found.replay
        return LossOut(total=total, metrics=metrics, rows=rows)

    @torch.no_grad()
    def _aims(self, reward: Tensor, value: Tensor, cont: Tensor, tail: Tree, factor: Tensor | None) -> _Aims:
        """What the losses compare with, from imagined reward [N, H], value and cont [N, H + 1].

        Replayed returns bootstrap from imagined ones. A row that is_last has no successor inside its episode:
        it carries no loss, and returns do not run over it.
        """
        size, last = tail["reward"].shape
        returns = lambda_return(F.pad(reward, (1, 0)), value, cont, torch.full_like(cont, self.lambda_))
        scale = self.returns.update(returns)
        reached = imagination_weights(cont)[:, :-1]  # [N, H]
        live = (~tail["is_terminal"]).float() * self.discount
        trace = (~tail["is_last"]).float() * self.lambda_
        replayed = lambda_return(tail["reward"], returns[:, 0].view(size, last), live, trace)  # [B, K - 1]
        live = F.pad((~tail["is_last"][:, :-1]).float(), (0, 1))  # [B, K]
        weight, replay_weight = reached, live
        if factor is not None:
            weight = reached * factor.repeat_interleave(last).unsqueeze(1)
            replay_weight = live * factor.unsqueeze(1)
        return _Aims(
            returns=returns,
            scale=scale,
            advantage=(returns - value[:, :-1]) / scale,
            reached=reached,
            weight=weight / weight.numel(),
            replay_returns=F.pad(replayed, (0, 1)),
            live=live,
            replay_weight=replay_weight / (size * (last - 1)),
        )

    def _by_regions(
        self,
        model: DreamerWorldModel,
        starts: Tree,
        tail: Tree,
        feat: Tensor,
        noise: Tree,
        factor: Tensor | None,
    ) -> _Found:
        """The losses with gradients written out: imagination and heads in one region, losses in another."""
        dynamics, reward, cont = model.imagination()
        heads = HeadWeights(self.actor.weights(), self.critic.weights(), self.slow.weights(), reward, cont)
        begin = Starts(starts["deter"], starts["stoch"], noise["action"], noise["stoch"])
        policy, bins = self.actor.distribution, self.critic.bins
        imagined, traces = self.backend.imagine(begin, dynamics, heads, policy, bins, self._room(begin))
        self._kept = (imagined, traces)
        aims = self._aims(imagined.reward.t(), imagined.value.t(), imagined.cont.t(), tail, factor)
        targets = Targets(
            returns=aims.returns.t(),
            advantage=aims.advantage.t(),
            weight=aims.weight.t(),
            replay_returns=aims.replay_returns.flatten(),
            replay_weight=aims.replay_weight.flatten(),
        )
        scales = self.scales
        factors = Factors(scales.policy, scales.value, scales.replay_value, self.entropy, self.slow_weight)
        given = (feat, imagined, traces, targets, heads, policy, bins, factors)
        total, losses = self.backend.actor_critic(*given)
        return _Found(
            aims=aims,
            policy=losses.policy,
            critic=losses.value,
            replay=losses.replay_value,
            entropy=losses.entropy / aims.returns.numel(),
            reward=imagined.reward,
            cont=imagined.cont,
            value=imagined.value,
            replay_value=imagined.value[0],
            total=total,
        )

    def _room(self, starts: Starts) -> tuple[Imagined, Any] | None:
        """What the last imagination returned, if one from `starts` fits into it."""
        if self._kept is None or starts.deter.is_cuda:
            return None
        kept = self._kept[0].action.shape[1::-1]  # [N, H]
        return self._kept if kept == starts.action_noise.shape[:2] else None

    def _by_modules(
        self, model: object, starts: Tree, tail: Tree, feat: Tensor, noise: Tree, factor: Tensor | None
    ) -> _Found:
        """The losses for autograd, with any world model: the reference of `_by_regions`."""
        rollout, root = self._imagine(model, starts | {"feat": feat.detach()}, noise)
        cont = torch.cat([root.unsqueeze(1), rollout.out["cont"]], 1)  # [N, H + 1]
        critic = self.critic(rollout.feat)  # [N, H + 1]
        value = critic.mean()
        with torch.no_grad():
            slow = self.slow(rollout.feat).mean()
        aims = self._aims(rollout.out["reward"], value, cont, tail, factor)
        raw = self.actor(rollout.feat)[:, :-1]  # [N, H, R]; the last state chose nothing
        entropy = self.actor.entropy(raw)
        # REINFORCE with entropy bonus; the log-probability belongs to the state the action was chosen in.
        gain = self.actor.log_prob(raw, rollout.action) * aims.advantage + self.entropy * entropy
        # The last state has no return: weight zero is cheaper than cutting it out of the logits.
        critic_loss = F.pad(aims.weight, (0, 1)) * self._critic_loss(
            critic, F.pad(aims.returns, (0, 1)), slow
        )
        replay = self.critic(feat)  # [N]
        replay_loss = self._critic_loss(replay, aims.replay_returns.flatten(), slow[:, 0])
        return _Found(
            aims=aims,
            policy=-(aims.weight * gain).sum(),
            critic=critic_loss.sum(),
            replay=(aims.replay_weight.flatten() * replay_loss).sum(),
            entropy=entropy.mean(),
            reward=rollout.out["reward"],
            cont=cont,
            value=value,
            replay_value=replay.mean().detach(),
        )

    @torch.no_grad()
    def _imagine(self, model: object, starts: Tree, noise: Tree) -> tuple[Rollout, Tensor]:
        """Rollout from the starts [N, ...] under the sampled policy, and the starts' continuation [N]."""

        def policy(state: Tree, h: int) -> Tensor:
            return self.act(state["feat"], noise["action"][:, h], "train")

        rollout = model.imagine(starts, self.horizon, policy, noise)  # type: ignore[attr-defined]
        root = model.read(starts, frozenset({"cont"}))["cont"]  # type: ignore[attr-defined]
        return rollout, root

    def _critic_loss(self, critic: TwoHot, target: Tensor, slow: Tensor) -> Tensor:
        """Cross-entropy towards the two-hot return plus that towards the slow critic's value; [...]."""
        return critic.loss(target, slow, scales=(1.0, self.slow_weight))

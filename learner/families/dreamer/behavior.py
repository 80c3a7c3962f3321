"""The DreamerV3 behavior: actor and critic learned in imagination, critic also on replayed rows.

The world model is a constant here: imagination runs without gradients, the actor learns by REINFORCE for both
kinds of action, and the only gradient into the world model is that of the replay value loss.
Source: arXiv 2301.04104, "Critic learning" and "Actor learning"; numbers of the current official code.
Letters: B batch, T time, K trailing rows used as starts, N = B*K, H horizon, A action, F feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.families.dreamer.config import DreamerConfig
from learner.health.signals import value_signals
from learner.interfaces import Capability, LossOut, Mode, Rollout, Tree
from learner.nn.heads import BoundedNormalHead, DiscreteActionHead, TwoHotHead
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
        last = self.trailing(states["feat"].shape[0], time)
        starts = {k: states[k][:, time - last :].detach().flatten(0, 1) for k in ("deter", "stoch", "feat")}
        rollout, root = self._imagine(model, starts, noise)
        cont = torch.cat([root.unsqueeze(1), rollout.out["cont"]], 1)  # [N, H + 1]
        reached = imagination_weights(cont)[:, :-1]  # [N, H]
        factor = batch.get("weight")
        weight = reached if factor is None else reached * factor.repeat_interleave(last).unsqueeze(1)
        critic = self.critic(rollout.feat)  # [N, H + 1]
        with torch.no_grad():
            value = critic.mean()  # [N, H + 1]
            slow = self.slow(rollout.feat).mean()
            reward = torch.cat([torch.zeros_like(root).unsqueeze(1), rollout.out["reward"]], 1)
            returns = lambda_return(reward, value, cont, torch.full_like(cont, self.lambda_))  # [N, H]
            scale = self.returns.update(returns)
            advantage = (returns - value[:, :-1]) / scale
        policy, entropy = self._policy_loss(rollout, advantage, weight)
        # The last state has no return: weight zero is cheaper than cutting it out of the logits.
        padded = F.pad(returns, (0, 1))
        critic_loss = (
            F.pad(weight, (0, 1)) * self._critic_loss(critic, padded, slow)
        ).sum() / returns.numel()
        tail = {k: batch[k][:, time - last :] for k in ("reward", "is_last", "is_terminal")}
        bootstrap = returns[:, 0].view(-1, last)
        replay, error, replayed = self._replay_loss(
            states["feat"][:, time - last :], tail, bootstrap, slow[:, 0].view(-1, last), factor
        )
        scales = self.scales
        total = scales.policy * policy + scales.value * critic_loss + scales.replay_value * replay
        metrics = {
            "loss/policy": policy.detach(),
            "loss/value": critic_loss.detach(),
            "loss/replay_value": replay.detach(),
            "entropy/policy": entropy.detach(),
            "imagined/return": returns.mean(),
            "imagined/return_scale": scale,
            "imagined/return_range": self.returns.pending[1] - self.returns.pending[0],
            "imagined/reward": rollout.out["reward"].mean(),
            "imagined/cont": cont.mean(),
            "imagined/value": value.mean(),
            "imagined/weight": reached.mean(),
            "imagined/advantage": advantage.abs().mean(),
        } | replayed
        return LossOut(total=total, metrics=metrics, rows={} if error is None else {"error": error})

    @torch.no_grad()
    def _imagine(self, model: object, starts: Tree, noise: Tree) -> tuple[Rollout, Tensor]:
        """Rollout from the starts [N, ...] under the sampled policy, and the starts' continuation [N]."""

        def policy(state: Tree, h: int) -> Tensor:
            return self.act(state["feat"], noise["action"][:, h], "train")

        rollout = model.imagine(starts, self.horizon, policy, noise)  # type: ignore[attr-defined]
        root = model.read(starts, frozenset({"cont"}))["cont"]  # type: ignore[attr-defined]
        return rollout, root

    def _policy_loss(self, rollout: Rollout, advantage: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """REINFORCE with entropy bonus; the log-probability belongs to the state the action was chosen in."""
        raw = self.actor(rollout.feat)[:, :-1]  # [N, H, R]; the last state chose nothing
        log_prob = self.actor.log_prob(raw, rollout.action)
        entropy = self.actor.entropy(raw)
        loss = -(weight * (log_prob * advantage + self.entropy * entropy)).mean()
        return loss, entropy.mean()

    def _critic_loss(self, critic: TwoHot, target: Tensor, slow: Tensor) -> Tensor:
        """Cross-entropy towards the two-hot return plus that towards the slow critic's value; [...]."""
        return critic.loss(target, slow, scales=(1.0, self.slow_weight))

    def _replay_loss(
        self, feat: Tensor, rows: Tree, bootstrap: Tensor, slow: Tensor, factor: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Critic loss on replayed rows [B, K] whose returns bootstrap from imagined returns; when asked for,
        how far the value of each row is from its return [B, K]; and both of them in figures.

        A row that is_last has no successor inside its episode: it carries no loss, and returns do not
        run over it.
        """
        live = (~rows["is_terminal"]).float() * self.discount
        trace = (~rows["is_last"]).float() * self.lambda_
        target = lambda_return(rows["reward"], bootstrap, live, trace)  # [B, K - 1]
        critic, target = self.critic(feat), F.pad(target, (0, 1))
        loss = self._critic_loss(critic, target, slow)
        weight = F.pad((~rows["is_last"][:, :-1]).float(), (0, 1))
        value = critic.mean().detach()
        error = weight * (value - target).abs() if self.row_error else None
        replayed = value_signals(value, target, weight)
        if factor is not None:
            weight = weight * factor.unsqueeze(1)
        return (weight * loss).sum() / (target.shape[0] * (target.shape[1] - 1)), error, replayed

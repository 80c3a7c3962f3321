"""The DreamerV3 world model: encoder, RSSM, decoder, reward and continuation heads, and their losses.

Source: arXiv 2301.04104, "World model learning"; numbers of the current official code.
Letters: B batch, T time, N imagined trajectories, H horizon, D deter, S variables, C classes, F = D + C*S.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learner.distributed import mean_over_ranks
from learner.families.dreamer.config import DreamerConfig
from learner.interfaces import Capability, ImaginedPolicy, LossOut, Rollout, Tree, action_space, obs_space
from learner.nn.categorical import entropy, free_nats_kl
from learner.nn.decoder import Decoder
from learner.nn.encoder import Encoder
from learner.nn.heads import BinaryHead, TwoHotHead, binary_cross_entropy
from learner.nn.imagine import DynamicsWeights, Head
from learner.nn.rssm import RSSM, RSSMSizes, features
from system.specs import EnvSpec


def rssm_sizes(config: DreamerConfig) -> RSSMSizes:
    """The RSSM part of a config."""
    return RSSMSizes(
        deter=config.deter,
        hidden=config.hidden,
        stoch=config.stoch,
        classes=config.classes,
        blocks=config.blocks,
        unimix=config.unimix,
        prior_layers=config.prior_layers,
    )


def make_encoder(config: DreamerConfig, env: EnvSpec) -> Encoder:
    """The encoder of a config; the same on learner and actors."""
    return Encoder(
        env.obs,
        units=config.units,
        layers=config.encoder_layers,
        depth=config.depth,
        mults=config.mults,
        kernel=config.kernel,
    )


class DreamerWorldModel(nn.Module):
    """Implements learner.interfaces.WorldModel."""

    caps: frozenset[Capability] = frozenset({"step", "reward", "cont", "prior", "decode", "embed"})

    def __init__(self, config: DreamerConfig, env: EnvSpec) -> None:
        super().__init__()
        self.obs_space = {key: obs_space(spec) for key, spec in env.obs.items()}
        self.action_space = action_space(env.action)
        self.scales, self.free_nats = config.scales, config.free_nats
        self.row_error = False  # True: rows["error"] of a loss tells how badly each row was modelled
        self.discount = 1.0 - 1.0 / config.discount_horizon
        sizes = rssm_sizes(config)
        self.feat_size = sizes.feat
        self.encoder = make_encoder(config, env)
        self.rssm = RSSM(sizes, env.action.width, self.encoder.outputs)
        self.decoder = Decoder(
            env.obs,
            deter=sizes.deter,
            stoch=sizes.stoch * sizes.classes,
            units=config.units,
            layers=config.decoder_layers,
            depth=config.depth,
            mults=config.mults,
            kernel=config.kernel,
            blocks=config.blocks,
        )
        self.reward = TwoHotHead(sizes.feat, config.units, config.reward_layers, config.bins, 0.0)
        self.cont = BinaryHead(sizes.feat, config.units, config.cont_layers)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"main": list(self.parameters())}

    def after_step(self, applied: Tensor) -> None:
        del applied

    def noise(self, batch: int, time: int, generator: torch.Generator) -> Tree:
        """Uniforms [B, T, S], one per categorical sample."""
        shape = (batch, time, self.rssm.sizes.stoch)
        return {"stoch": torch.rand(shape, generator=generator, device=generator.device)}

    def initial(self, batch: int) -> Tree:
        return self.rssm.initial(batch)

    def observe(
        self, carry: Tree, obs: Tree, prev_action: Tensor, is_first: Tensor, noise: Tree
    ) -> tuple[Tree, Tree]:
        return self.rssm.observe(carry, self.encoder(obs), prev_action, is_first, noise["stoch"])

    def step(self, state: Tree, action: Tensor, noise: Tree) -> tuple[Tree, Tree]:
        after = self.rssm.step(state, action, noise["stoch"])
        return after, self.read(after, frozenset({"reward", "cont"}))

    def loss(self, batch: Tree, carry: Tree, noise: Tree) -> LossOut:
        """Reconstruction, reward, continuation and KL of replayed rows.

        batch: obs dict, prev_action [B, T, A], reward, is_first, is_terminal [B, T]; optional weight [B],
        a factor on the losses of each sequence.
        """
        states = self.observe(carry, batch["obs"], batch["prev_action"], batch["is_first"], noise)[1]
        feat = features(states)  # [B, T, F]
        prior = self.rssm.prior.probs(states["deter"])
        dyn, rep = free_nats_kl(states["probs"], prior, self.free_nats)
        recons = self.decoder.reconstruction(feat, batch["obs"])  # each [B, T]
        losses = {f"obs/{key}": value for key, value in recons.items()}
        weights = dict.fromkeys(losses, self.scales.reconstruction)
        losses |= {"dyn": dyn, "rep": rep} | self._outcome_losses(feat, batch)
        scales = self.scales
        weights |= {"dyn": scales.dyn, "rep": scales.rep, "reward": scales.reward, "cont": scales.cont}
        factor = batch.get("weight")
        if factor is None:
            means = {key: value.mean() for key, value in losses.items()}
        else:
            means = {key: (value * factor.unsqueeze(1)).mean() for key, value in losses.items()}
        metrics = {f"loss/{key}": value.detach() for key, value in means.items()}
        with torch.no_grad():
            metrics["entropy/prior"] = entropy(prior).mean()
            metrics["entropy/posterior"] = entropy(states["probs"]).mean()
            # Of all rows together: what it has more than each row's own is what latents tell rows apart by.
            metrics["entropy/marginal"] = entropy(mean_over_ranks(states["probs"].mean((0, 1))))
        total = torch.stack([means[key] * weights[key] for key in means]).sum()
        states["feat"] = feat
        rows = {key: states[key].detach() for key in ("deter", "stoch")}
        if self.row_error:
            rows["error"] = torch.stack([losses[key].detach() * weights[key] for key in losses]).sum(0)
        return LossOut(total=total, metrics=metrics, states=states, rows=rows)

    def _outcome_losses(self, feat: Tensor, batch: Tree) -> dict[str, Tensor]:
        """Reward and continuation losses [B, T]. Only termination ends a return: time limits do not."""
        cont = (~batch["is_terminal"]).float() * self.discount
        return {
            "reward": self.reward(feat).loss(batch["reward"]),
            "cont": binary_cross_entropy(self.cont(feat), cont),
        }

    def imagine(self, state: Tree, horizon: int, policy: ImaginedPolicy | Tensor, noise: Tree) -> Rollout:
        """Roll the prior forward from state [N, ...]; noise["stoch"] [N, H, S].

        The policy sees {"feat": [N, F]}.
        """
        deter, stoch = state["deter"], state["stoch"].flatten(1)
        size = deter.shape[-1]
        feats = deter.new_empty(deter.shape[0], horizon + 1, self.feat_size)  # [N, H + 1, F]
        actions: list[Tensor] = []
        core, driver = self.rssm.core.weights()
        for h in range(horizon + 1):
            feats[:, h, :size] = deter
            feats[:, h, size:] = stoch
            if h == horizon:
                break
            action = policy[:, h] if isinstance(policy, Tensor) else policy({"feat": feats[:, h]}, h)
            drive = self.rssm.core.drive(action, driver)
            after = self.rssm.predict({"deter": deter, "stoch": stoch}, drive, noise["stoch"][:, h], core)
            deter, stoch = after["deter"], after["stoch"].flatten(1)
            actions.append(action)
        reached = feats[:, 1:]
        # The heads read the whole buffer and drop the start: a contiguous pass is cheaper than a copy.
        outcome = self.read({"feat": feats}, frozenset({"reward", "cont"}))
        states = {
            "deter": reached[..., :size],
            "stoch": reached[..., size:].unflatten(-1, state["stoch"].shape[1:]),
        }
        out = {key: value[:, 1:] for key, value in outcome.items()}
        return Rollout(state=states, action=torch.stack(actions, 1), out=out, feat=feats)

    def imagination(self) -> tuple[DynamicsWeights, Head, Head]:
        """Core with prior, reward and continuation head, as the region of imagination reads them."""
        return self.rssm.dynamics(), self.reward.weights(), self.cont.weights()

    def read(self, state: Tree, what: frozenset[str]) -> Tree:
        """Any of feat, reward, cont (probability times discount), obs (in environment units)."""
        feat = state["feat"] if "feat" in state else features(state)
        out: Tree = {}
        if "feat" in what:
            out["feat"] = feat
        if "reward" in what:
            out["reward"] = self.reward(feat).mean()
        if "cont" in what:
            out["cont"] = torch.sigmoid(self.cont(feat))
        if "obs" in what:
            out["obs"] = self.decoder.predictions(self.decoder(feat))
        return out

"""One training step of TorchRL's DreamerV3, put together from its public modules at the official size1m.

The same losses as ours: separate KL terms with free nats, two-hot reward and value, continuation, REINFORCE,
replay value loss 0.3, slow critic, adaptive clipping and LaProp. Eager, its default on CPUs. Images go
through its own CNN (stride 2, no pooling), which is not the official one: compare those rows roughly.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import (
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    SymExpTwoHot,
    WorldModelWrapper,
)
from torchrl.modules.distributions.continuous import IndependentNormal
from torchrl.objectives import (
    DreamerV3ActorLoss,
    DreamerV3Loss,
    DreamerV3ModelLoss,
    DreamerV3ValueLoss,
    SoftUpdate,
    symexp,
    symlog,
)
from torchrl.trainers.algorithms import DreamerV3Optimizer

from bench.peers import learner_load as load

STATE = load.STOCH * load.CLASSES
FEAT = STATE + load.DETER
DISCOUNT = 1 - 1 / 333


class Actor(nn.Module):
    """Mean and standard deviation of a bounded normal policy."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = DreamerV3MLP(FEAT, None, depth=3, num_cells=load.UNITS)
        self.mean, self.std = nn.Linear(load.UNITS, load.ACTION), nn.Linear(load.UNITS, load.ACTION)

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(belief, state)
        return torch.tanh(self.mean(hidden)), 0.1 + 0.9 * torch.sigmoid(self.std(hidden) + 2)


def networks(case: str) -> dict[str, nn.Module]:
    """The trained modules, by what they do."""
    if case == "image":
        encoder: nn.Module = DreamerV3ImageEncoder(3, depth=load.DEPTH)
        tokens = encoder(torch.zeros(1, 3, load.SIDE, load.SIDE)).shape[-1]
        decoder: nn.Module = DreamerV3ImageDecoder(FEAT, depth=load.DEPTH)
    else:
        encoder = DreamerV3MLP(load.VECTOR, None, depth=3, num_cells=load.UNITS)
        tokens = load.UNITS
        decoder = DreamerV3MLP(FEAT, load.VECTOR, depth=3, num_cells=load.UNITS)
    prior = RSSMPriorV3(
        action_shape=(load.ACTION,),
        hidden_dim=load.UNITS,
        rnn_hidden_dim=load.DETER,
        num_categoricals=load.STOCH,
        num_classes=load.CLASSES,
        action_dim=load.ACTION,
        unimix=0.01,
        recurrent_model="block_gru",
        num_blocks=load.BLOCKS,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=load.UNITS,
        num_categoricals=load.STOCH,
        num_classes=load.CLASSES,
        rnn_hidden_dim=load.DETER,
        obs_embed_dim=tokens,
        unimix=0.01,
        use_rms_norm=True,
    )
    return {
        "encoder": encoder,
        "decoder": decoder,
        "prior": prior,
        "posterior": posterior,
        "reward": DreamerV3MLP(FEAT, load.BINS, depth=1, num_cells=load.UNITS, outscale=0.0),
        "cont": DreamerV3MLP(FEAT, 1, depth=1, num_cells=load.UNITS),
        "actor": Actor(),
        "value": DreamerV3MLP(FEAT, load.BINS, depth=3, num_cells=load.UNITS, outscale=0.0),
    }


def step(module: Any, inputs: list[Any], outputs: list[Any]) -> TensorDictModule:
    return TensorDictModule(module, in_keys=inputs, out_keys=outputs)


def world_model(case: str, nets: dict[str, nn.Module]) -> TensorDictSequential:
    """Encoder, rollout, decoder and the two outcome heads over real sequences."""
    latent: list[Any] = [("next", "belief"), ("next", "state")]
    image = case == "image"
    prior = step(
        nets["prior"],
        ["state", "belief", "action"],
        [("next", "prior_logits"), ("next", "state"), ("next", "belief")],
    )
    posterior = step(
        nets["posterior"],
        [("next", "belief"), ("next", "tokens")],
        [("next", "posterior_logits"), ("next", "state")],
    )
    same = nn.Identity()
    return TensorDictSequential(
        step(same if image else symlog, [("next", "observation")], [("next", "seen")]),
        step(nets["encoder"], [("next", "seen")], [("next", "tokens")]),
        RSSMRolloutV3(prior, posterior, reset_key="is_init"),
        step(nets["decoder"], [("next", "state"), ("next", "belief")], [("next", "raw")]),
        step(same if image else symexp, [("next", "raw")], [("next", "reco_pixels")]),
        step(nets["reward"], latent, [("next", "reward_logits")]),
        step(SymExpTwoHot(load.BINS), [("next", "reward_logits")], [("next", "reward")]),
        step(nets["cont"], latent, [("next", "continue_pred")]),
    )


def dream(nets: dict[str, nn.Module]) -> DreamerEnv:
    """The world model as an environment to imagine in."""
    reward = TensorDictSequential(
        step(nets["reward"], ["belief", "state"], ["reward_logits"]),
        step(SymExpTwoHot(load.BINS), ["reward_logits"], ["reward"]),
    )
    env = DreamerEnv(
        WorldModelWrapper(
            step(nets["prior"], ["state", "belief", "action"], ["_", "state", "belief"]), reward
        ),
        prior_shape=(STATE,),
        belief_shape=(load.DETER,),
    )
    env.observation_spec = Composite(state=Unbounded(STATE), belief=Unbounded(load.DETER))
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Bounded(-1, 1, (load.ACTION,))
    env.reward_spec = Unbounded((1,))
    return env


def losses(case: str, nets: dict[str, nn.Module]) -> DreamerV3Loss:
    """All losses of one update, at the official weights."""
    actor = ProbabilisticTensorDictSequential(
        step(nets["actor"], ["state", "belief"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            default_interaction_type=InteractionType.RANDOM,
            distribution_class=IndependentNormal,
            return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )
    value = TensorDictSequential(
        step(nets["value"], ["belief", "state"], ["state_value_logits"]),
        step(SymExpTwoHot(load.BINS), ["state_value_logits"], ["state_value"]),
    )
    cont = TensorDictSequential(
        step(nets["cont"], ["belief", "state"], ["continue_logits"]),
        step(nn.Sigmoid(), ["continue_logits"], ["continuation"]),
    )
    model_loss = DreamerV3ModelLoss(
        world_model(case, nets),
        lambda_continue=1.0,
        kl_mode="separate",
        unimix=0.01,
        continue_target_scale=DISCOUNT,
        reco_symlog=case != "image",
        global_average=False,
        detach_output=False,
    )
    model_loss.set_keys(pixels="observation")
    actor_loss = DreamerV3ActorLoss(actor, value, dream(nets), continuation_model=cont, use_reinforce=True)
    value_loss = DreamerV3ValueLoss(
        value, value_loss="two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    return DreamerV3Loss(model_loss, actor_loss, value_loss)


def batch(case: str) -> TensorDict:
    """The made-up rows as TorchRL keeps them: what follows an action lies under "next"."""
    rows = {key: torch.from_numpy(value) for key, value in load.made_up(case).items()}
    lead = [load.BATCH, load.LENGTH]
    obs = rows["obs"].movedim(-1, -3).contiguous().float() / 255 if case == "image" else rows["obs"]
    done = rows["is_last"].unsqueeze(-1)
    following = {"observation": obs, "reward": rows["reward"].unsqueeze(-1), "done": done, "terminated": done}
    return TensorDict(
        {
            "state": torch.zeros(*lead, STATE),
            "belief": torch.zeros(*lead, load.DETER),
            "action": rows["action"],
            "is_init": rows["is_first"].unsqueeze(-1),
            "next": following,
        },
        lead,
    )


def main() -> None:
    options = load.arguments()
    nets = networks(options.case)
    parameters = [p for net in nets.values() for p in net.parameters()]
    loss, sample = losses(options.case, nets), batch(options.case)
    slow = SoftUpdate(loss.value_loss, tau=0.02)
    optimiser = DreamerV3Optimizer(parameters)

    def update() -> float:
        out = loss(sample)
        total = sum(value for key, value in out.items() if isinstance(key, str) and key.startswith("loss_"))
        optimiser.zero_grad(set_to_none=False)
        total.backward()
        optimiser.step()
        slow.step()
        return float(total.detach())

    count = sum(p.numel() for p in parameters)
    load.time_updates("torchrl", options.case, update, count, options.seconds)


if __name__ == "__main__":
    main()

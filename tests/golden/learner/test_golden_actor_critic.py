"""Actor, critic and replay-value losses on scripted imaginations, against float64."""

import numpy as np
import pytest
import torch

from learner.families.dreamer.behavior import ActorCritic
from learner.families.dreamer.config import DreamerConfig
from learner.interfaces import Rollout
from learner.nn.layers import initialise
from system.specs import ActionSpec

B, T, H, F, A = 2, 4, 3, 6, 3
LAM, DISCOUNT = 0.95, 1.0 - 1.0 / 333.0


class ScriptedModel:
    """A world model whose imagination is written down: features, rewards and continuations are given."""

    def __init__(self, feat, reward, cont, root):
        self.feat, self.reward, self.cont, self.root = feat, reward, cont, root

    def imagine(self, state, horizon, policy, noise):
        assert state["feat"].shape == (B * T, F)
        assert horizon == H
        actions = torch.stack([policy({"feat": self.feat[:, h]}, h) for h in range(horizon)], 1)
        return Rollout(
            state={}, action=actions, out={"reward": self.reward, "cont": self.cont}, feat=self.feat
        )

    def read(self, state, what):
        assert what == {"cont"}
        return {"cont": self.root}


def sorted_bins():
    grid = np.linspace(-20.0, 20.0, 255)
    return np.sign(grid) * np.expm1(np.abs(grid))


def cross_entropy(logits, target):
    """-log-likelihood of the two-hot code; logits [..., 255] in sorted bin order, float64."""
    bins = sorted_bins()
    log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= logits.max(-1, keepdims=True)
    above = np.clip(np.searchsorted(bins, target, side="right"), 1, 254)
    share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
    take = np.take_along_axis
    low, high = (
        take(log_probs, above[..., None] - 1, -1)[..., 0],
        take(log_probs, above[..., None], -1)[..., 0],
    )
    return -((1 - share) * low + share * high)


def to_sorted(logits):
    logits = logits.detach().double().numpy()
    return np.concatenate([logits[..., 128:][..., ::-1], logits[..., :128]], -1)


def mean_of(logits):
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return (probs / probs.sum(-1, keepdims=True) * sorted_bins()).sum(-1)


def reference_returns(reward, value, cont):
    out, after = [], value[:, -1]
    for h in reversed(range(reward.shape[1])):
        after = reward[:, h] + cont[:, h] * ((1 - LAM) * value[:, h + 1] + LAM * after)
        out.append(after)
    return np.stack(out[::-1], 1)


@pytest.fixture
def scene():
    """A behavior with peaked random critics, and a script with one root behind a terminal row."""
    config = DreamerConfig(size="size1m", units=8, horizon=H)
    behavior = ActorCritic(config, F, ActionSpec(kind="discrete", classes=(A,)))
    generator = torch.Generator().manual_seed(0)
    initialise(behavior, generator)
    with torch.no_grad():
        # Logits fall off with the bin's magnitude, so that expectations are of the order of ten.
        slope = -1.5 * torch.cat([torch.arange(128.0), torch.arange(1.0, 128.0)]) / 10
        for critic, seed in ((behavior.critic, 1), (behavior.slow, 2)):
            noise = torch.randn(critic.logits.weight.shape, generator=torch.Generator().manual_seed(seed))
            critic.logits.weight.copy_(0.3 * noise)
            critic.logits.bias.copy_(slope)
    rng = np.random.default_rng(3)
    n = B * T
    feat = torch.tensor(rng.normal(size=(n, H + 1, F)), dtype=torch.float32)
    reward = torch.tensor(rng.normal(size=(n, H)), dtype=torch.float32)
    cont = torch.tensor(rng.uniform(0.9, 1.0, size=(n, H)), dtype=torch.float32)
    root = torch.full((n,), DISCOUNT)
    root[2], cont[5, 1] = 0.0, 0.0  # a start behind a terminal row; an imagined terminal
    states = {
        "deter": torch.zeros(B, T, 1),
        "stoch": torch.zeros(B, T, 1, 1),
        "feat": feat[:, 0].view(B, T, F).clone().requires_grad_(),
    }
    rows = {
        "reward": torch.tensor(rng.normal(size=(B, T)), dtype=torch.float32),
        "is_last": torch.tensor([[False, True, False, False], [False, False, True, False]]),
        "is_terminal": torch.tensor([[False, True, False, False], [False, False, False, False]]),
    }
    noise = behavior.noise(B, T, generator)
    return behavior, ScriptedModel(feat, reward, cont, root), rows, states, noise


def imagined(behavior, model):
    """(critic logits, slow means, weights, returns) in float64."""
    logits = to_sorted(behavior.critic(model.feat).logits)
    slow = mean_of(to_sorted(behavior.slow(model.feat).logits))
    cont = np.concatenate([model.root[:, None], model.cont], 1).astype(np.float64)
    returns = reference_returns(model.reward.double().numpy(), mean_of(logits), cont[:, 1:])
    return logits, slow, np.cumprod(cont, 1)[:, :-1], returns


def test_critic_loss_weighs_imagined_rows_by_the_chance_to_reach_them(scene):
    behavior, model, rows, states, noise = scene
    out = behavior.loss(model, rows, states, noise)
    logits, slow, weight, returns = imagined(behavior, model)
    assert weight[2].tolist() == [0.0, 0.0, 0.0]  # the start behind a terminal row teaches nothing
    assert weight[5, 1] > 0.0
    assert weight[5, 2] == 0.0  # nothing counts behind the imagined terminal
    expected = weight * (cross_entropy(logits[:, :-1], returns) + cross_entropy(logits[:, :-1], slow[:, :-1]))
    assert out.metrics["loss/value"].item() == pytest.approx(expected.mean(), rel=1e-4)


def test_policy_loss_is_reinforce_with_normalised_advantage_and_entropy(scene):
    behavior, model, rows, states, noise = scene
    out = behavior.loss(model, rows, states, noise)
    logits, _, weight, returns = imagined(behavior, model)
    low, high = np.percentile(returns, 5) * 0.01, np.percentile(returns, 95) * 0.01
    advantage = (returns - mean_of(logits)[:, :-1]) / max(1.0, high - low)
    log_probs = behavior.actor(model.feat).detach().double().numpy()[:, :-1]
    probs = np.exp(log_probs)
    action = (np.cumsum(probs, -1)[..., :-1] < noise["action"].numpy()).sum(-1)
    chosen = np.take_along_axis(log_probs, action[..., None], -1)[..., 0]
    entropy = -(probs * log_probs).sum(-1)
    expected = -(weight * (chosen * advantage + 3e-4 * entropy)).mean()
    assert out.metrics["loss/policy"].item() == pytest.approx(expected, rel=1e-4)


def test_replay_value_loss_bootstraps_from_imagined_returns_and_reaches_the_features(scene):
    behavior, model, rows, states, noise = scene
    out = behavior.loss(model, rows, states, noise)
    _, slow, _, returns = imagined(behavior, model)
    boot = returns[:, 0].reshape(B, T)
    reward = rows["reward"].double().numpy()
    live = (~rows["is_terminal"].numpy()) * DISCOUNT
    trace = (~rows["is_last"].numpy()) * LAM
    target, after = np.zeros((B, T - 1)), boot[:, -1]
    for t in reversed(range(T - 1)):
        after = reward[:, t + 1] + live[:, t + 1] * (
            (1 - trace[:, t + 1]) * boot[:, t + 1] + trace[:, t + 1] * after
        )
        target[:, t] = after
    assert target[0, 0] == pytest.approx(reward[0, 1])  # row 1 is terminal: its reward alone
    assert target[1, 1] == pytest.approx(reward[1, 2] + DISCOUNT * boot[1, 2])  # row 2 is a time limit
    logits = to_sorted(behavior.critic(states["feat"]).logits)[:, :-1]
    loss = cross_entropy(logits, target) + cross_entropy(logits, slow[:, 0].reshape(B, T)[:, :-1])
    keep = ~rows["is_last"].numpy()[:, :-1]  # a last row has no successor in its episode
    assert out.metrics["loss/replay_value"].item() == pytest.approx((keep * loss).mean(), rel=1e-4)
    (by_feat,) = torch.autograd.grad(out.total, [states["feat"]])
    reached = by_feat.abs().sum(-1) > 0
    assert reached.tolist() == [[True, False, True, False], [True, True, False, False]]


def test_actor_learns_nothing_from_the_critic_losses(scene):
    behavior, model, rows, states, noise = scene
    silent = dict.fromkeys(("policy",), 0.0)
    behavior.scales = behavior.scales.model_copy(update=silent)
    behavior.loss(model, rows, states, noise).total.backward()
    for parameter in behavior.actor.parameters():
        assert parameter.grad is None or torch.count_nonzero(parameter.grad) == 0
    for parameter in behavior.slow.parameters():
        assert parameter.grad is None


def test_capped_imagination_takes_the_last_rows_of_every_sequence():
    config = DreamerConfig(size="size1m", units=8, imagination_starts=12)
    behavior = ActorCritic(config, F, ActionSpec(kind="continuous", size=2))
    assert behavior.trailing(4, 64) == 3
    assert behavior.trailing(16, 64) == 2  # one replay return needs two rows
    assert behavior.trailing(4, 2) == 2
    assert (
        ActorCritic(DreamerConfig(size="size1m"), F, ActionSpec(kind="continuous", size=2)).trailing(4, 64)
        == 64
    )

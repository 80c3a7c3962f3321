"""Encoder, losses, policy heads, imagination, slow critic, initial weights: from the equations in float64."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from learner.families.dreamer.behavior import ActorCritic
from learner.families.dreamer.config import DreamerConfig
from learner.families.dreamer.world_model import DreamerWorldModel, make_encoder
from learner.nn.decoder import Decoder
from learner.nn.heads import BoundedNormalHead, DiscreteActionHead
from learner.nn.layers import BlockLinear, Conv, Linear, initialise, truncated_normal
from system.specs import ActionSpec, ArraySpec, EnvSpec

TINY = DreamerConfig(
    size="nano", deter=16, hidden=8, stoch=3, classes=4, units=8, blocks=4, depth=4, bins=15, horizon=3
)
ACTION = ActionSpec(kind="discrete", classes=(3, 2))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def array(tensor):
    return tensor.detach().double().numpy()


def norm_silu(x, scale):
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale
    return y * sigmoid(y)


def mlp(module, x):
    for linear, norm in zip(module.linear, module.norm, strict=True):
        x = norm_silu(x @ array(linear.weight).T + array(linear.bias), array(norm.scale))
    return x


def squash(x):
    return np.sign(x) * np.log1p(np.abs(x))


def shaken(module, seed=0):
    """The module with every parameter off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    initialise(module, generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def env(**obs):
    return EnvSpec(name="toy", obs=obs, action=ACTION)


def test_vectors_are_squashed_and_discrete_entries_one_hot_before_the_mlp():
    spec = env(
        a=ArraySpec(shape=(2, 2), dtype="float32"),
        b=ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=3),
        c=ArraySpec(shape=(1,), dtype="float32"),
    )
    encoder = shaken(make_encoder(TINY, spec))
    rng = np.random.default_rng(0)
    a, c = 30.0 * rng.normal(size=(5, 2, 2)), rng.normal(size=(5, 1))
    b = rng.integers(0, 3, size=(5, 2))
    obs = {"a": torch.tensor(a).float(), "b": torch.tensor(b).int(), "c": torch.tensor(c).float()}
    hot = np.eye(3)[b].reshape(5, -1)
    expected = mlp(encoder.mlp, np.concatenate([squash(a).reshape(5, -1), hot, squash(c)], -1))
    np.testing.assert_allclose(array(encoder(obs)), expected, rtol=1e-4, atol=1e-5)


def test_images_are_convolved_pooled_and_normed_over_channels():
    encoder = shaken(make_encoder(TINY, env(image=ArraySpec(shape=(16, 16, 3), dtype="uint8", kind="image"))))
    image = np.random.default_rng(1).integers(0, 256, size=(2, 16, 16, 3)).astype(np.uint8)
    x = image / 255.0 - 0.5  # [N, H, W, C]
    for conv, norm in zip(encoder.cnn[0].conv, encoder.cnn[0].norm, strict=True):
        windows = sliding_window_view(np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), (5, 5), (1, 2))
        x = np.einsum("nhwcij,ocij->nhwo", windows, array(conv.weight)) + array(conv.bias)
        n, h, w, c = x.shape
        x = norm_silu(x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4)), array(norm.scale))
    assert x.shape == (2, 4, 4, 16)
    tokens = encoder({"image": torch.tensor(image)})
    np.testing.assert_allclose(array(tokens), x.reshape(2, -1), rtol=1e-4, atol=1e-4)


def test_reconstruction_losses_by_hand():
    obs = {
        "image": ArraySpec(shape=(16, 16, 1), dtype="uint8", kind="image"),
        "kind": ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=3),
        "vector": ArraySpec(shape=(2,), dtype="float32"),
    }
    decoder = Decoder(obs, deter=16, stoch=12, units=8, layers=1, depth=4, mults=(1, 2), kernel=5, blocks=4)
    logits = torch.tensor([[[0.0, np.log(2.0), 0.0], [5.0, 5.0, 5.0]]])
    raw = {
        "vector": torch.tensor([[1.0, -2.0]]),
        "kind": logits,
        "image": torch.full((1, 16, 16, 1), 0.25),
    }
    target = {
        "vector": torch.tensor([[np.e - 1.0, 0.0]]).float(),  # symlog: 1, 0
        "kind": torch.tensor([[1, 2]], dtype=torch.int32),
        "image": torch.full((1, 16, 16, 1), 255, dtype=torch.uint8),
    }
    losses = decoder.losses(raw, target, 1)
    assert losses["vector"].tolist() == pytest.approx([4.0], abs=1e-5)
    assert losses["kind"].tolist() == pytest.approx([np.log(2.0) + np.log(3.0)], rel=1e-5)
    assert losses["image"].tolist() == pytest.approx([256 * 0.75**2], rel=1e-5)


def test_discrete_policy_is_one_categorical_per_component():
    head = shaken(DiscreteActionHead(5, 8, 2, (3, 2), 1.0, 0.0))
    feat = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    hidden = mlp(head.mlp, array(feat))
    parts = [hidden @ array(x.weight).T + array(x.bias) for x in head.logits]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in parts]
    raw = head(feat)
    np.testing.assert_allclose(array(raw), np.concatenate(logs, -1), rtol=1e-4, atol=1e-5)
    noise = torch.rand(4, 2, generator=torch.Generator().manual_seed(2))
    action = head.sample(raw, noise)
    chosen = [
        (np.cumsum(np.exp(x), -1)[:, :-1] < u[:, None]).sum(-1)
        for x, u in zip(logs, noise.numpy().T, strict=True)
    ]
    np.testing.assert_array_equal(
        array(action), np.concatenate([np.eye(n)[i] for n, i in zip((3, 2), chosen, strict=True)], -1)
    )
    rows = np.arange(4)
    expected = sum(x[rows, i] for x, i in zip(logs, chosen, strict=True))
    np.testing.assert_allclose(array(head.log_prob(raw, action)), expected, rtol=1e-4)
    entropy = sum(-(np.exp(x) * x).sum(-1) for x in logs)
    np.testing.assert_allclose(array(head.entropy(raw)), entropy, rtol=1e-4)


def test_continuous_policy_is_a_normal_with_bounded_mean_and_deviation():
    head = shaken(BoundedNormalHead(5, 8, 2, 3, 1.0, 0.1, 1.0))
    feat = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    hidden = mlp(head.mlp, array(feat))
    mean = np.tanh(hidden @ array(head.mean.weight).T + array(head.mean.bias))
    std = 0.1 + 0.9 * sigmoid(hidden @ array(head.std.weight).T + array(head.std.bias) + 2.0)
    raw = head(feat)
    np.testing.assert_allclose(array(raw), np.concatenate([mean, std], -1), rtol=1e-4, atol=1e-5)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    action = head.sample(raw, noise)
    np.testing.assert_allclose(array(action), mean + std * array(noise), rtol=1e-4, atol=1e-5)
    density = -0.5 * array(noise) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(array(head.log_prob(raw, action)), density.sum(-1), rtol=1e-3, atol=1e-4)
    entropy = 0.5 * np.log(2 * np.pi * np.e * std**2)
    np.testing.assert_allclose(array(head.entropy(raw)), entropy.sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(array(head.mode(raw)), array(raw)[:, :3])


def test_imagination_samples_the_prior_of_the_new_deter_and_reads_the_arrived_state():
    model = shaken(DreamerWorldModel(TINY, env(x=ArraySpec(shape=(2,), dtype="float32"))))
    generator = torch.Generator().manual_seed(3)
    actions = torch.rand(2, TINY.horizon, 5, generator=generator)
    uniform = torch.rand(2, TINY.horizon, 3, generator=generator)
    state = {"deter": torch.randn(2, 16, generator=generator), "stoch": torch.zeros(2, 4, 3)}
    with torch.no_grad():
        rollout = model.imagine(state, TINY.horizon, actions, {"stoch": uniform})
        for h in range(TINY.horizon):
            after = model.rssm.step(state, actions[:, h], uniform[:, h])
            prior = model.rssm.prior
            logits = mlp(prior.mlp, array(after["deter"])) @ array(prior.logits.weight).T
            logits = (logits + array(prior.logits.bias)).reshape(2, 4, 3)
            probs = 0.99 * np.exp(logits) / np.exp(logits).sum(-2, keepdims=True) + 0.01 / 4
            chosen = (np.cumsum(probs, -2)[:, :-1] < uniform[:, h].numpy()[:, None]).sum(-2)
            np.testing.assert_array_equal(after["stoch"].argmax(-2).numpy(), chosen)
            torch.testing.assert_close(rollout.state["deter"][:, h], after["deter"])
            assert torch.equal(rollout.state["stoch"][:, h], after["stoch"])
            feat = np.concatenate([array(after["deter"]), array(after["stoch"]).reshape(2, -1)], -1)
            hidden = mlp(model.cont.mlp, feat)
            cont = sigmoid(hidden @ array(model.cont.logit.weight).T + array(model.cont.logit.bias))
            np.testing.assert_allclose(array(rollout.out["cont"][:, h]), cont[:, 0], rtol=1e-4)
            state = after


def test_slow_critic_follows_by_two_percent_an_update():
    behavior = ActorCritic(TINY, 28, ACTION)
    with torch.no_grad():
        for parameter in behavior.critic.parameters():
            parameter.fill_(2.0)
        for parameter in behavior.slow.parameters():
            parameter.fill_(1.0)
    behavior.after_step(torch.tensor(True))
    behavior.after_step(torch.tensor(True))
    expected = 2.0 - 0.98**2
    assert all(torch.allclose(p, torch.full_like(p, expected)) for p in behavior.slow.parameters())


def test_initial_weights_have_the_variance_of_the_fan_in_and_no_tails():
    generator = torch.Generator().manual_seed(0)
    for layer, fan_in in ((Linear(400, 300), 400), (BlockLinear(400, 400, 4), 400), (Conv(12, 40, 5), 300)):
        layer.reset(generator)
        weight = array(layer.weight)
        assert weight.std() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert np.abs(weight).max() <= 2 * 1.1368 * fan_in**-0.5 * (1 + 1e-6)
        assert not layer.bias.any()
    weight = torch.ones(3, 4)
    truncated_normal(weight, 4, 0.0, generator)
    assert not weight.any()

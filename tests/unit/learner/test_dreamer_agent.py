"""The DreamerV3 agent: sizes, learning, determinism, guards, and what it asks of sequences."""

from collections import Counter

import numpy as np
import pytest
import torch

from learner.catalog import make_agent, make_config, overlay_columns
from learner.nn.codec import pack_float, pack_one_hot, unpack_float, unpack_one_hot
from system.errors import SchemaError
from system.experience import Sequence, SequenceIds
from system.specs import ActionSpec, ArraySpec, EnvSpec

TINY = {
    "size": "nano",
    "deter": 16,
    "hidden": 8,
    "stoch": 4,
    "classes": 4,
    "units": 8,
    "depth": 2,
    "blocks": 4,
    "bins": 15,
    "horizon": 3,
    "imagination_starts": 0,
}


def vector_env(size=3):
    obs = {"vector": ArraySpec(shape=(size,), dtype="float32")}
    return EnvSpec(name="toy", obs=obs, action=ActionSpec(kind="discrete", classes=(2,)))


def mixed_env():
    """Every kind of observation together, and two discrete action components."""
    obs = {
        "front": ArraySpec(shape=(24, 20, 3), dtype="uint8", kind="image"),
        "map": ArraySpec(shape=(24, 20, 1), dtype="uint8", kind="image"),
        "wide": ArraySpec(shape=(16, 48, 1), dtype="uint8", kind="image"),
        "grid": ArraySpec(shape=(7, 7, 3), dtype="uint8", kind="image"),
        "pose": ArraySpec(shape=(2, 3), dtype="float32"),
        "clock": ArraySpec(shape=(), dtype="float32"),
        "door": ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=5),
        "mode": ArraySpec(shape=(), dtype="int32", kind="discrete", classes=3),
    }
    return EnvSpec(name="mixed", obs=obs, action=ActionSpec(kind="discrete", classes=(3, 4)))


def draw(env, columns, batch=4, rows=7, seed=0, context=1):
    rng = np.random.default_rng(seed)
    out = {}
    for key, spec in env.obs.items():
        shape = (batch, rows, *spec.shape)
        if spec.kind == "discrete":
            out[key] = rng.integers(0, spec.classes, shape).astype(np.int32)
        elif spec.kind == "image":
            out[key] = rng.integers(0, 256, shape).astype(np.uint8)
        else:
            out[key] = (5.0 * rng.normal(size=shape)).astype(np.float32)
    out["action"] = env.action.sample(rng, batch * rows).reshape(batch, rows, *env.action.shape)
    out["reward"] = rng.normal(size=(batch, rows)).astype(np.float32)
    out["is_last"] = rng.random((batch, rows)) < 0.1
    out["is_terminal"] = out["is_last"] & (rng.random((batch, rows)) < 0.5)
    out["is_first"] = np.roll(out["is_last"], 1, 1)
    for key, spec in columns.items():
        out[key] = np.zeros((batch, rows, *spec.shape), spec.dtype)
    zeros = np.zeros(batch)
    ids = SequenceIds(
        shard=zeros.astype(np.int32), stream=zeros.astype(np.int32), start=zeros.astype(np.int64)
    )
    return Sequence(columns=out, ids=ids, context=context)


def build(env, seed=0, **settings):
    config = make_config("dreamer", TINY | settings)
    agent = make_agent("dreamer", config, env, device="cpu", seed=seed)
    return agent, overlay_columns("dreamer", config, env)


def replaced(sequence, **columns):
    return Sequence(columns={**sequence.columns, **columns}, ids=sequence.ids, context=sequence.context)


def part_counts(agent):
    counts = Counter()
    for name, parameter in agent.module.named_parameters():
        if parameter.requires_grad:
            counts[name.split(".")[1]] += parameter.numel()
    return dict(counts)


def test_parameter_counts_of_the_official_vector_case():
    obs = {"vector": ArraySpec(shape=(24,), dtype="float32")}
    env = EnvSpec(name="walker", obs=obs, action=ActionSpec(kind="continuous", size=6))
    agent = make_agent("dreamer", make_config("dreamer", {"size": "size1m"}), env, device="cpu", seed=0)
    assert agent.parameter_count() == 640_867
    assert part_counts(agent) == {
        "encoder": 10_112,
        "rssm": 364_416,
        "decoder": 51_096,
        "reward": 57_663,
        "cont": 41_153,
        "actor": 50_316,
        "critic": 66_111,
    }


def test_parameter_count_of_the_official_image_case():
    obs = {"image": ArraySpec(shape=(64, 64, 3), dtype="uint8", kind="image")}
    env = EnvSpec(name="atari", obs=obs, action=ActionSpec(kind="discrete", classes=(6,)))
    agent = make_agent("dreamer", make_config("dreamer", {"size": "size1m"}), env, device="cpu", seed=0)
    assert agent.parameter_count() == 686_456


@pytest.mark.parametrize("env", [vector_env(), mixed_env()], ids=["vector", "mixed"])
def test_learning_on_one_batch_lowers_every_reconstruction_loss(env):
    agent, columns = build(env, lr=3e-3, warmup=0)
    batch = draw(env, columns, batch=2, rows=4)
    carry, losses = agent.initial(2), []
    for _ in range(60):
        carry, metrics, _ = agent.learn(batch, carry)
        losses.append(metrics)
    for key in env.obs:
        curve = [metrics[f"loss/obs/{key}"] for metrics in losses]
        assert min(curve) < 0.9 * curve[0], key
    assert losses[-1]["loss/reward"] < losses[0]["loss/reward"]
    assert all(np.isfinite(list(metrics.values())).all() for metrics in losses)


def test_continuous_actions_train():
    obs = {"vector": ArraySpec(shape=(3,), dtype="float32")}
    env = EnvSpec(name="arm", obs=obs, action=ActionSpec(kind="continuous", size=2))
    agent, columns = build(env)
    metrics = [agent.learn(draw(env, columns, seed=i), {})[1] for i in range(3)]
    assert metrics[-1]["nonfinite"] == 0.0
    assert np.isfinite(metrics[-1]["loss/policy"])


def test_bf16_stays_close_to_fp32():
    env = vector_env()
    results = {}
    for dtype in ("fp32", "bf16"):
        agent, columns = build(env, dtype=dtype)
        results[dtype] = agent.learn(draw(env, columns), {})[1]
        assert agent.parameters.values.dtype == torch.float32
    assert results["bf16"]["loss/total"] == pytest.approx(results["fp32"]["loss/total"], rel=0.05)


def test_same_seed_gives_identical_bits_and_another_seed_does_not():
    env = vector_env()
    runs = []
    for seed in (3, 3, 4):
        agent, columns = build(env, seed=seed)
        for i in range(3):
            agent.learn(draw(env, columns, seed=i), {})
        runs.append(agent.parameters.values.clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_loaded_state_continues_bit_for_bit():
    env = vector_env()
    agent, columns = build(env, warmup=2)
    for i in range(3):
        agent.learn(draw(env, columns, seed=i), {})
    other, _ = build(env, seed=99, warmup=2)
    other.load(agent.state())
    for i in range(3, 6):
        first, second = (a.learn(draw(env, columns, seed=i), {}) for a in (agent, other))
        assert first[1] == second[1]
        assert first[2] is not None
        assert second[2] is not None
        np.testing.assert_array_equal(first[2].columns["deter"], second[2].columns["deter"])
    assert torch.equal(agent.parameters.values, other.parameters.values)
    for a, b in zip(agent.behavior.slow.parameters(), other.behavior.slow.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_holds_only_arrays_and_numbers():
    agent, _ = build(vector_env())

    def leaves(tree):
        for value in tree.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    assert all(isinstance(leaf, np.ndarray | int | float) for leaf in leaves(agent.state()))


def test_state_is_a_copy_that_later_updates_do_not_touch():
    env = vector_env()
    agent, columns = build(env, warmup=0)
    state, weights = agent.state(), agent.weights()
    before = {k: v.copy() for k, v in state["parameters"].items()}
    published = {k: v.copy() for k, v in weights.items()}
    agent.learn(draw(env, columns), {})
    for name, array in before.items():
        np.testing.assert_array_equal(array, state["parameters"][name])
    for name, array in published.items():
        np.testing.assert_array_equal(array, weights[name])


def test_state_of_another_model_is_refused_and_changes_nothing():
    agent, _ = build(vector_env())
    other, _ = build(vector_env(), units=16)
    before = agent.parameters.values.clone()
    with pytest.raises(SchemaError, match="belong to another model"):
        agent.load(other.state())
    state = agent.state()
    state["slow"] = other.state()["slow"]
    with pytest.raises(SchemaError, match="slow critic"):
        agent.load(state)
    trained, columns = build(vector_env(), warmup=0)
    trained.learn(draw(vector_env(), columns), {})
    with pytest.raises(SchemaError, match="return range"):
        agent.load({**trained.state(), "returns": np.zeros(3, np.float32)})
    assert torch.equal(before, agent.parameters.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
    env = vector_env()
    agent, columns = build(env, warmup=0)
    agent.learn(draw(env, columns), {})
    before = agent.state()
    batch = draw(env, columns, seed=1)
    reward = batch.columns["reward"].copy()
    reward[0, 3] = bad
    _, metrics, rows = agent.learn(replaced(batch, vector=batch.columns["vector"] * np.float32(bad)), {})
    assert metrics["nonfinite"] == 1.0
    assert rows is None
    after = agent.state()
    for part in ("parameters", "slow"):
        for name, array in before[part].items():
            np.testing.assert_array_equal(array, after[part][name])
    for name, array in before["optimiser"]["rms"].items():
        np.testing.assert_array_equal(array, after["optimiser"]["rms"][name])
    np.testing.assert_array_equal(before["returns"], after["returns"])
    assert agent.learn(replaced(batch, reward=reward), {})[1]["nonfinite"] == 1.0
    assert agent.learn(batch, {})[1]["nonfinite"] == 0.0


def test_write_back_covers_the_trained_rows_with_decodable_latents():
    env = vector_env()
    agent, columns = build(env)
    batch = draw(env, columns, batch=4, rows=7)
    rows = agent.learn(batch, {})[2]
    assert rows is not None
    assert rows.offset == 1
    assert {k: (v.shape, v.dtype.name) for k, v in rows.columns.items()} == {
        "deter": ((4, 6, 16), "uint16"),
        "stoch": ((4, 6, 4), "uint8"),
    }
    assert rows.columns["stoch"].max() < 4


def test_context_row_supplies_latents_and_previous_action_unless_an_episode_begins():
    env = vector_env()
    agent, columns = build(env)
    batch = draw(env, columns, batch=2, rows=3)
    first = np.zeros((2, 3), bool)
    first[1, 1] = True
    rng = np.random.default_rng(5)
    deter = torch.tensor(rng.normal(size=(2, 3, 16)), dtype=torch.float32)
    stored = replaced(
        batch, is_first=first, deter=pack_float(deter), stoch=rng.integers(0, 4, (2, 3, 4)).astype(np.uint8)
    )
    rows, start = agent.prepare(stored)
    assert torch.allclose(start["deter"], deter[:, 0], rtol=1e-2)
    assert pack_one_hot(start["stoch"]).tolist() == stored.columns["stoch"][:, 0].tolist()
    assert rows["reward"].shape == (2, 2)
    chosen = rows["prev_action"].argmax(-1).numpy()
    np.testing.assert_array_equal(chosen, stored.columns["action"][:, :2, 0])
    results = []
    for columns_ in ({}, {"deter": pack_float(-deter), "action": 1 - stored.columns["action"]}):
        fresh, _ = build(env)
        write = fresh.learn(replaced(stored, **columns_), {})[2]
        assert write is not None
        results.append(unpack_float(write.columns["deter"][:, 0], torch.device("cpu")))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_sequence_without_context_starts_from_the_zero_state():
    env = vector_env()
    agent, columns = build(env)
    rows, start = agent.prepare(draw(env, columns, batch=2, rows=3, context=0))
    assert torch.count_nonzero(start["deter"]) == 0
    assert torch.count_nonzero(rows["prev_action"][:, 0]) == 0
    assert agent.learn(draw(env, columns, context=0), {})[1]["nonfinite"] == 0.0
    with pytest.raises(SchemaError, match="nothing to train on"):
        agent.learn(draw(env, columns, rows=1), {})
    with pytest.raises(SchemaError, match="must have 2"):
        agent.learn(draw(env, columns, rows=2), {})


def test_time_limit_is_not_terminal_in_the_continuation_target():
    env = vector_env()
    losses = {}
    for kind in ("neither", "time limit", "terminal"):
        agent, columns = build(env)
        batch = draw(env, columns)
        shape = batch.shape
        none, last = np.zeros(shape, bool), np.zeros(shape, bool)
        last[:, -1] = True
        flags = {
            "is_last": none if kind == "neither" else last,
            "is_terminal": last if kind == "terminal" else none,
        }
        losses[kind] = agent.learn(replaced(batch, is_first=none, **flags), {})[1]["loss/cont"]
    assert losses["time limit"] == losses["neither"]
    assert losses["terminal"] != losses["neither"]


def test_row_before_a_first_row_counts_as_last_even_if_the_episode_was_abandoned():
    env = vector_env()
    agent, columns = build(env)
    batch = draw(env, columns, batch=1, rows=5)
    first, last = np.zeros((1, 5), bool), np.zeros((1, 5), bool)
    first[0, 3] = True
    rows, _ = agent.prepare(replaced(batch, is_first=first, is_last=last, is_terminal=last))
    assert rows["is_last"].tolist() == [[False, True, False, False]]
    assert not rows["is_terminal"].any()
    assert not last.any()  # the reader's arrays are left alone


def test_read_only_arrays_are_accepted():
    env = mixed_env()
    agent, columns = build(env)
    batch = draw(env, columns, batch=2, rows=3)
    for array in batch.columns.values():
        array.flags.writeable = False
    assert agent.learn(batch, {})[1]["nonfinite"] == 0.0


def test_latent_codec_round_trips():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    back = unpack_float(pack_float(x), torch.device("cpu"))
    assert torch.equal(back, x.to(torch.bfloat16).float())
    index = np.array([[0, 3], [2, 1]], np.uint8)
    assert pack_one_hot(unpack_one_hot(index, 4, torch.device("cpu"))).tolist() == index.tolist()


def test_weights_hold_what_an_actor_needs_and_nothing_else():
    agent, _ = build(vector_env())
    parts = {".".join(name.split(".")[:2]) for name in agent.weights()}
    assert parts == {"encoder.mlp", "rssm.core", "rssm.posterior", "actor.mlp", "actor.logits"}
    assert {a.dtype for a in agent.weights().values()} == {np.dtype(np.float32)}


def test_stage_draws_one_context_row_whose_latents_are_stored():
    agent, _ = build(vector_env())
    (stage,) = agent.stages(16, 64)
    assert (stage.spec.batch, stage.spec.length, stage.spec.context) == (16, 64, 1)
    assert {"deter", "stoch"} <= set(agent.columns)

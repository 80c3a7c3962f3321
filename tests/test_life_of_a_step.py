"""A guided tour: one environment step through all eight stops of README, "Life of a step", in one process.

Letters: N environments, n rows of one recv, S slots of a segment, B batch, T rows of a sequence.
"""

from pathlib import Path

import numpy as np

from actors.actor import Actor
from actors.envs.catalog import make_env
from actors.envs.toy import counter_row
from actors.loop import env_loop
from actors.random_policy import RandomPolicy
from actors.staging import Staging
from learner.catalog import make_agent, make_config, make_policy, overlay_columns
from learner.publish import Publisher
from replay.admission import stream_key
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.segment import Segment
from replay.shard import ReplayShard
from system.experience import StreamId
from system.params.memory import MemoryWeights
from system.specs import TableSpec
from system.weights import NO_VERSION, PolicyVersion

N, B, T, CONTEXT, CHUNK = 3, 2, 8, 1, 16


def test_one_step_passes_all_eight_stops(tmp_path: Path) -> None:
    env = make_env("toy:counter", N, options={"image_side": 16})
    config = make_config("dreamer", {"size": "nano"})
    table = TableSpec.of(env.spec, overlay_columns("dreamer", config, env.spec))

    # 1 An environment shows what arrived: obs, reward, flags.
    env.start(seed=7)
    step = env.recv(timeout=1.0)
    assert step.env_id.shape == step.reward.shape == step.is_first.shape == (N,)
    assert step.obs["image"].shape == (N, 16, 16, 3)
    assert step.obs["vector"].shape == (N, 5)
    assert step.is_first.all()

    # 2 The loop lets a policy act on it: the row is whole, action and policy columns included.
    env.start(seed=7)
    policy = make_policy("dreamer", config, env.spec, seed=0)
    loop = env_loop(env, RandomPolicy(env.spec.action, 0, policy.columns), "train")
    made = next(loop)
    assert made.action.shape == (N, 1)
    assert {k: v.shape for k, v in made.extras.items()} == {"deter": (N, config.deter), "stoch": (N, 16)}
    assert made.version == NO_VERSION

    # 3 The actor stages rows by stream and gives each its identity: a chunk.
    staging = Staging(4, 1, N, table, policy.columns, CHUNK)
    staging.add(made)
    while not staging.full:
        staging.add(next(loop))
    chunks = staging.flush()
    chunk = next(c for c in chunks if c.stream == StreamId(actor=4, env=1))
    assert [len(c) for c in chunks] == [len(chunk)] * N
    assert chunk.columns["image"].shape == (len(chunk), 16, 16, 3)
    assert set(chunk.columns) == set(table.all)
    first = {name: int(chunk.columns[name][0]) for name in ("incarnation", "episode", "step")}
    assert first == {"incarnation": 1, "episode": 0, "step": 0}

    # 4 A shard checks it, copies it into a mapped segment and acknowledges.
    shard = ReplayShard(tmp_path, 0, table, capacity_rows=4096)
    ack = shard.append(chunks, timeout=5.0)
    assert (ack.committed, ack.duplicates) == (N * len(chunk), 0)
    assert shard.append(chunks, timeout=5.0).duplicates == N * len(chunk)  # sent twice, stored once
    segment = Segment.open(next((tmp_path / "shard-0000").glob("*e0001.zarr")), table)
    slot = segment.slots[:, 1].tolist().index(1)  # of environment 1
    assert segment.columns["image"].shape == (*segment.committed.shape, segment.geometry.rows, 16, 16, 3)
    assert segment.committed[slot] == len(chunk)
    np.testing.assert_array_equal(segment.columns["image"][slot, 0], step.obs["image"][1])

    # 5 A reader draws sequences that hold it, as far as the train ratio allows.
    limiter = RateLimiter(train_ratio=1.0, prefill_rows=T, tolerance_rows=1024, min_rows=T + CONTEXT)
    reader = LocalReader(
        tmp_path, table, batch=B, length=T, context=CONTEXT, seed=0, limiter=limiter, controls=[shard]
    )
    sequence = reader.sample(timeout=5.0)
    assert sequence.shape == (B, CONTEXT + T)
    assert sequence.columns["vector"].shape == (B, CONTEXT + T, 5)
    assert limiter.trained == B * T
    assert set(sequence.ids.stream.tolist()) <= {stream_key(StreamId(actor=4, env=e)) for e in range(N)}
    episode, at = sequence.columns["episode"][0], sequence.columns["step"][0]
    env_id = np.full(CONTEXT + T, sequence.ids.stream[0] & 0xFFFF)
    truth = counter_row(7, env_id, episode.astype(int), at.astype(int), side=16)
    np.testing.assert_array_equal(sequence.columns["image"][0], truth["image"])

    # 6 The agent trains on them: world model, imagination, one update; fresher latents go back.
    agent = make_agent("dreamer", config, env.spec, device="cpu", seed=0)
    _, metrics, write_back = agent.learn(sequence, agent.initial(B))
    assert np.isfinite([v for k, v in metrics.items() if k.startswith("loss")]).all()
    assert write_back is not None
    assert write_back.columns["deter"].shape == (B, T, config.deter)
    assert reader.write_back(write_back) == B * T

    # 7 The learner publishes the new policy under a new version.
    store = MemoryWeights()
    publisher = Publisher(agent, store, every_updates=1)
    publisher.after_update()
    publisher.flush(timeout=10.0)
    publisher.stop()
    assert store.newest(timeout=1.0) == publisher.version == PolicyVersion(1, 1)

    # 8 The actor loads it and chooses the next action with it.
    env.close()
    again = make_env("toy:counter", N, options={"image_side": 16})
    actor = Actor(
        5, 1, again, policy, shard, store,
        table=table, seed=1, chunk_rows=CHUNK, wait_for_policy=True,
    )  # fmt: skip
    report = actor.run(seconds=0.2)
    assert actor.close() == 0
    assert report.policy_version == policy.version == PolicyVersion(1, 1)
    assert report.rows > 0
    rows = Segment.open(segment.path, table)
    newest = rows.columns["policy_version"][rows.slots[:, 0].tolist().index(5), 0]
    assert PolicyVersion.decode(int(newest)) == (1, 1)  # every row says which policy chose its action
    shard.close()

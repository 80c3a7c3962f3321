"""A guided tour: one environment step through all eight stops of README, "Life of a step", in one process.

Start at the test at the bottom; each stop above it asserts the shapes there.
Letters: N environments, B batch, T rows of a sequence, D deterministic state, S stochastic variables.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from actors.actor import Actor
from actors.envs.catalog import make_env
from actors.envs.toy import counter_row
from actors.loop import LoopStep, env_loop
from actors.random_policy import RandomPolicy
from actors.staging import Staging
from learner.catalog import make_agent, make_config, make_policy, overlay_columns
from learner.publish import Publisher
from replay.admission import stream_key
from replay.limiter import RateLimiter
from replay.reader import LocalReader
from replay.segment import Segment
from replay.shard import ReplayShard
from system.experience import Chunk, Sequence, Step, StreamId
from system.interfaces import Agent, Policy, VectorEnv
from system.params.memory import MemoryWeights
from system.specs import EnvSpec, TableSpec
from system.weights import NO_VERSION, PolicyVersion

N, B, T, CONTEXT, CHUNK, SEED, SIDE = 3, 2, 8, 1, 16, 7, 16
CONFIG = make_config("dreamer", {"size": "nano"})
D, S = CONFIG.deter, CONFIG.stoch


def toy() -> VectorEnv:
    return make_env("toy:counter", N, options={"image_side": SIDE})


def stop_1_arrives(env: VectorEnv) -> Step:
    """An environment shows what arrived: observation, reward, flags."""
    env.start(SEED)
    step = env.recv(timeout=1.0)
    assert step.env_id.shape == step.reward.shape == step.is_first.shape == (N,)
    assert step.obs["image"].shape == (N, SIDE, SIDE, 3)
    assert step.obs["vector"].shape == (N, 5)
    assert step.is_first.all()
    return step


def stop_2_is_acted_on(loop: Iterator[LoopStep]) -> LoopStep:
    """The loop lets a policy act on it: now the row is whole, the policy's columns included."""
    made = next(loop)
    assert made.action.shape == (N, 1)
    assert {k: v.shape for k, v in made.extras.items()} == {"deter": (N, D), "stoch": (N, S)}
    assert made.version == NO_VERSION
    return made


def stop_3_becomes_part_of_a_chunk(loop: Iterator[LoopStep], made: LoopStep, table: TableSpec) -> list[Chunk]:
    """The actor stages rows by stream and gives each its identity."""
    staging = Staging(4, 1, N, table, table.overlay, CHUNK)
    staging.add(made)
    while not staging.full:
        staging.add(next(loop))
    chunks = staging.flush()
    assert [str(chunk.stream) for chunk in chunks] == ["a4e0", "a4e1", "a4e2"]
    for chunk in chunks:
        assert chunk.columns["image"].shape == (len(chunk), SIDE, SIDE, 3)
        assert set(chunk.columns) == set(table.all)
        assert [int(chunk.columns[k][0]) for k in ("incarnation", "episode", "step")] == [1, 0, 0]
    return chunks


def stop_4_is_stored(shard: ReplayShard, root: Path, chunks: list[Chunk], step: Step) -> Segment:
    """A shard checks it, copies it into a mapped segment, commits and acknowledges."""
    rows = sum(map(len, chunks))
    ack = shard.append(chunks, timeout=5.0)
    assert (ack.committed, ack.duplicates) == (rows, 0)
    assert shard.append(chunks, timeout=5.0).duplicates == rows  # sent twice, stored once
    segment = Segment.open(next((root / "shard-0000").glob("*e0001.zarr")), shard.table)
    slots = len(segment.committed)
    assert segment.columns["image"].shape == (slots, segment.geometry.rows, SIDE, SIDE, 3)
    slot = segment.slots[:, 1].tolist().index(1)  # of environment 1
    assert segment.committed[slot] == len(chunks[1])
    np.testing.assert_array_equal(segment.columns["image"][slot, 0], step.obs["image"][1])
    return segment


def stop_5_is_sampled(reader: LocalReader) -> Sequence:
    """A reader draws sequences that hold it, as far as the train ratio allows."""
    sequence = reader.sample(timeout=5.0)
    assert sequence.shape == (B, CONTEXT + T)
    assert sequence.columns["vector"].shape == (B, CONTEXT + T, 5)
    assert reader.limiter.trained == B * T
    assert set(sequence.ids.stream.tolist()) <= {stream_key(StreamId(actor=4, env=e)) for e in range(N)}
    episode, at = (sequence.columns[name][0].astype(np.int64) for name in ("episode", "step"))
    env_id = np.full(CONTEXT + T, sequence.ids.stream[0] & 0xFFFF)
    truth = counter_row(SEED, env_id, episode, at, side=SIDE)
    np.testing.assert_array_equal(sequence.columns["image"][0], truth["image"])
    return sequence


def stop_6_is_learned_from(sequence: Sequence, reader: LocalReader, env: EnvSpec) -> Agent:
    """World model, imagination, one update; fresher latents go back to the rows."""
    agent = make_agent("dreamer", CONFIG, env, device="cpu", seed=0)
    _, metrics, write_back = agent.learn(sequence, agent.initial(B))
    assert np.isfinite([v for k, v in metrics.items() if k.startswith("loss")]).all()
    assert write_back is not None
    assert {k: v.shape for k, v in write_back.columns.items()} == {"deter": (B, T, D), "stoch": (B, T, S)}
    assert reader.write_back(write_back) == B * T
    return agent


def stop_7_is_published(agent: Agent, store: MemoryWeights) -> None:
    """The new policy goes out under a new version."""
    publisher = Publisher(agent, store, every_updates=1)
    publisher.after_update()
    publisher.flush(timeout=10.0)
    publisher.stop()
    assert store.newest(timeout=1.0) == publisher.version == PolicyVersion(1, 1)


def stop_8_decides_the_next_actions(
    policy: Policy, shard: ReplayShard, store: MemoryWeights, table: TableSpec
) -> None:
    """An actor loads it and acts; every row says which policy chose its action."""
    actor = Actor(
        5, 1, toy(), policy, shard, store, table=table, seed=1, chunk_rows=CHUNK, wait_for_policy=True
    )
    report = actor.run(seconds=0.1)
    assert actor.close() == 0
    assert report.rows > 0
    assert report.policy_version == policy.version == PolicyVersion(1, 1)


def test_one_step_passes_all_eight_stops(tmp_path: Path) -> None:
    env = toy()
    table = TableSpec.of(env.spec, overlay_columns("dreamer", CONFIG, env.spec))
    step = stop_1_arrives(env)

    env.start(SEED)  # the same first row again, now for the loop
    loop = env_loop(env, RandomPolicy(env.spec.action, 0, table.overlay), "train")
    made = stop_2_is_acted_on(loop)
    np.testing.assert_array_equal(made.step.obs["image"], step.obs["image"])
    chunks = stop_3_becomes_part_of_a_chunk(loop, made, table)

    shard = ReplayShard(tmp_path, 0, table, capacity_rows=4096)
    segment = stop_4_is_stored(shard, tmp_path, chunks, step)

    limiter = RateLimiter(train_ratio=1.0, prefill_rows=T, tolerance_rows=1024, min_rows=T + CONTEXT)
    reader = LocalReader(
        tmp_path, table, batch=B, length=T, context=CONTEXT, seed=0, limiter=limiter, controls=[shard]
    )
    sequence = stop_5_is_sampled(reader)
    agent = stop_6_is_learned_from(sequence, reader, env.spec)

    store = MemoryWeights()
    stop_7_is_published(agent, store)
    policy = make_policy("dreamer", CONFIG, env.spec, seed=0)
    stop_8_decides_the_next_actions(policy, shard, store, table)
    slot = segment.slots[:, 0].tolist().index(5)
    assert PolicyVersion.decode(int(segment.columns["policy_version"][slot, 0])) == (1, 1)
    shard.close()

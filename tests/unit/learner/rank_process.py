"""One learner rank as a process of its own: `python rank_process.py JSON`. What it saw goes to an .npz file.

A real agent on the smallest model that there is; the batches are made from a seed, as the test makes them.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.catalog import make_agent, make_config, overlay_columns
from learner.rank_join import RankPlace
from learner.ranks import RankedAgent, RankHub, RankWorker
from system.errors import RankLostError
from system.experience import Sequence, SequenceIds
from system.specs import ActionSpec, ArraySpec, EnvSpec

BATCH, ROWS, CONTEXT = 6, 9, 1
ENV = EnvSpec(
    name="toy",
    obs={
        "vector": ArraySpec(shape=(3,), dtype="float32"),
        "image": ArraySpec(shape=(16, 16, 1), dtype="uint8", kind="image"),
    },
    action=ActionSpec(kind="discrete", classes=(3,)),
)
SETTINGS: dict[str, Any] = {
    "size": "nano", "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "units": 8, "depth": 2, "blocks": 4,
    "bins": 15, "horizon": 3, "imagination_starts": 24, "warmup": 0, "return_floor": 1e-8,
}  # fmt: skip


def agent_of(seed: int = 0, **settings: Any) -> Any:
    config = make_config("dreamer", SETTINGS | settings)
    return make_agent("dreamer", config, ENV, device="cpu", seed=seed, priority_signal="model")


def batch_of(number: int) -> Sequence:
    """The same batch in every process; its importance weights and ids tell its sequences apart."""
    rng = np.random.default_rng(number)
    shape = (BATCH, ROWS)
    last = rng.random(shape) < 0.15
    columns: dict[str, Any] = {
        "vector": rng.normal(size=(*shape, 3)).astype(np.float32),
        "image": rng.integers(0, 256, (*shape, 16, 16, 1)).astype(np.uint8),
        "action": ENV.action.sample(rng, BATCH * ROWS).reshape(*shape, *ENV.action.shape),
        "reward": rng.normal(size=shape).astype(np.float32),
        "is_last": last,
        "is_terminal": last & (rng.random(shape) < 0.5),
        "is_first": np.roll(last, 1, 1),
    }
    config = make_config("dreamer", SETTINGS)
    for name, spec in overlay_columns("dreamer", config, ENV).items():
        columns[name] = np.zeros((*shape, *spec.shape), spec.dtype)
    ids = SequenceIds(
        shard=np.zeros(BATCH, np.int32),
        stream=np.arange(BATCH, dtype=np.int32),
        start=number * 100 + np.arange(BATCH, dtype=np.int64),
    )
    weights = rng.uniform(0.2, 1.0, BATCH).astype(np.float32)
    return Sequence(columns=columns, ids=ids, context=CONTEXT, weights=weights / weights.max())


def snapshot(agent: Any, metrics: dict[str, float], rows: Any) -> dict[str, Any]:
    """What two numbers of ranks must agree on after an update."""
    found: dict[str, Any] = {f"parameters/{k}": v for k, v in agent.state()["parameters"].items()}
    found |= {f"metrics/{k}": np.float64(v) for k, v in metrics.items()}
    found["percentiles"] = agent.behavior.returns.pair.numpy().copy()
    if rows is not None:
        found |= {f"rows/{k}": v for k, v in rows.columns.items()}
        found |= {"rows/priority": rows.priority, "ids/stream": rows.ids.stream, "ids/start": rows.ids.start}
    return found


def lead(place: RankPlace, task: dict[str, Any]) -> None:
    hub = RankHub(place, torch.device("cpu"))
    inner = agent_of(seed=task["seed"])
    inner.late = task["late"]
    agent = RankedAgent(inner, hub)
    say("joined")
    for number in range(task["updates"]):
        try:
            metrics, rows = agent.learn(batch_of(number), agent.initial(BATCH))[1:]
        except RankLostError as error:
            if error.intact:
                agent.state()  # what is saved then: asks no rank for anything
            raise
        if task["out"]:
            np.savez(f"{task['out']}-0-{number}.npz", **snapshot(inner, metrics, rows))
        say("update", number)
        if task["late"]:
            agent.load(agent.state())  # as a resumed run does, rows that nobody has reported included
    agent.state()  # compares the weights of all ranks
    agent.close()


def follow(place: RankPlace, task: dict[str, Any]) -> None:
    worker = RankWorker(place, torch.device("cpu"))
    inner = agent_of(seed=task["seed"] + place.rank)  # of no importance: it gets rank 0's state
    inner.late = task["late"]
    say("joined")
    if task["stuck_after"] is not None:
        inner = Stuck(inner, task["stuck_after"])
    if task["fail_after"] is not None:
        inner = Failing(inner, task["fail_after"])
    while worker.serve(inner, 1.0):
        pass
    if task["out"]:
        np.savez(f"{task['out']}-{place.rank}.npz", **snapshot(inner, {}, None))
    worker.close()


class Stuck:
    """An agent whose rank lives but does not get on."""

    def __init__(self, agent: Any, updates: int) -> None:
        self._agent, self._left = agent, updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def learn(self, sequence: Sequence, carry: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            time.sleep(600)
        return self._agent.learn(sequence, carry)


class Failing(Stuck):
    """An agent that meets an error of its own."""

    def learn(self, sequence: Sequence, carry: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise MemoryError("no memory for a batch")
        return self._agent.learn(sequence, carry)


def say(*words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    place = RankPlace(**task["place"])
    try:
        (lead if place.rank == 0 else follow)(place, task)
        say("done")
    except RankLostError as error:
        say("lost", error.ranks, str(error), error.intact)
    except MemoryError as error:
        say("failed", str(error))
    Path(f"{task['mark']}-{place.rank}").touch()
    os._exit(0)  # a collective that never ends must not keep the process


if __name__ == "__main__":
    main()

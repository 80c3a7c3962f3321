"""Loss curves of the general path, frozen: cases, seeds and how they are recorded.

`python -m tests.golden.learner.curves` writes curves.json again. Do that only when the mathematics of the
update is meant to change: a faster way to the same numbers has to reproduce the file.
"""

import json
from pathlib import Path

import numpy as np
import torch

from learner.catalog import make_agent, make_config, overlay_columns
from learner.nn.twohot import symlog
from system.experience import Sequence, SequenceIds
from system.specs import ActionSpec, ArraySpec, EnvSpec

FILE = Path(__file__).with_name("curves.json")
UPDATES, BATCH, ROWS = 20, 4, 9

NANO = {
    "size": "nano",
    "deter": 32,
    "hidden": 16,
    "units": 16,
    "stoch": 6,
    "classes": 4,
    "bins": 31,
    "horizon": 4,
    "imagination_starts": 12,
    "warmup": 5,
}
OFFICIAL = {
    "size": "size1m",
    "deter": 64,
    "hidden": 16,
    "units": 16,
    "stoch": 8,
    "horizon": 5,
    "lr": 1e-3,
    "warmup": 5,
}
VECTOR = {"vector": ArraySpec(shape=(3,), dtype="float32")}
IMAGE = {
    "image": ArraySpec(shape=(16, 16, 3), dtype="uint8", kind="image"),
    "door": ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=3),
}
CASES = {
    "nano-discrete": (
        NANO,
        EnvSpec(name="nano", obs=VECTOR, action=ActionSpec(kind="discrete", classes=(3,))),
        False,
    ),
    "official-continuous": (
        OFFICIAL,
        EnvSpec(name="arm", obs=VECTOR, action=ActionSpec(kind="continuous", size=2)),
        False,
    ),
    "official-several-weighted": (
        OFFICIAL | {"depth": 4, "actor_unimix": 0.01},
        EnvSpec(name="rooms", obs=IMAGE, action=ActionSpec(kind="discrete", classes=(3, 4))),
        True,
    ),
}
"""Config, environment, and whether sequences carry weights."""


def draw(env: EnvSpec, columns: dict[str, ArraySpec], seed: int, *, weighted: bool) -> Sequence:
    """A made-up batch [4, 1 + 8] with episode ends of both kinds."""
    rng = np.random.default_rng(seed)
    lead = (BATCH, ROWS)
    out = {}
    for key, spec in env.obs.items():
        shape = (*lead, *spec.shape)
        if spec.kind == "discrete":
            out[key] = rng.integers(0, spec.classes, shape).astype(np.int32)
        elif spec.kind == "image":
            out[key] = rng.integers(0, 256, shape).astype(np.uint8)
        else:
            out[key] = rng.normal(size=shape).astype(np.float32)
    out["action"] = env.action.sample(rng, BATCH * ROWS).reshape(*lead, *env.action.shape)
    out["reward"] = rng.normal(size=lead).astype(np.float32)
    out["is_last"] = rng.random(lead) < 0.2
    out["is_terminal"] = out["is_last"] & (rng.random(lead) < 0.5)
    out["is_first"] = np.roll(out["is_last"], 1, 1)
    out |= {key: np.zeros((*lead, *spec.shape), spec.dtype) for key, spec in columns.items()}
    weights = rng.uniform(0.2, 1.0, BATCH).astype(np.float32) if weighted else None
    zeros = np.zeros(BATCH, np.int32)
    ids = SequenceIds(shard=zeros, stream=zeros, start=np.zeros(BATCH, np.int64))
    return Sequence(columns=out, ids=ids, context=1, weights=weights)


def curve(case: str, backend: str = "torch") -> dict[str, list[float]]:
    """All metrics of 20 updates on four batches in turn."""
    settings, env, weighted = CASES[case]
    config = make_config("dreamer", settings | {"backend": backend})
    agent = make_agent("dreamer", config, env, device="cpu", seed=7)
    with torch.no_grad():
        # Flat predictions over bins up to 5e8 turn one rounding into a value of 0.1: begin with peaked ones.
        for head in (agent.model.reward, agent.behavior.critic, agent.behavior.slow):
            head.logits.bias.copy_(-1.5 * symlog(head.bins.abs()))
    columns = overlay_columns("dreamer", config, env)
    batches = [draw(env, columns, seed, weighted=weighted) for seed in range(4)]
    out: dict[str, list[float]] = {}
    for update in range(UPDATES):
        metrics = agent.learn(batches[update % 4], agent.initial(BATCH))[1]
        for name, value in metrics.items():
            out.setdefault(name, []).append(float(value))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({case: curve(case) for case in CASES}, indent=1) + "\n")

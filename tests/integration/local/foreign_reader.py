"""A stranger: reads a live replay with zarr alone and recomputes every row from its identity.

`python foreign_reader.py REPLAY SEED` prints one JSON object. It imports nothing of the replay: only zarr and
the toy environment's own formula, and the rule by which seeds are derived.
"""

import json
import sys
from pathlib import Path

import numpy as np
import zarr

from actors.envs.toy import counter_row
from system.seeds import child_seed

PARTS = ("image", "vector", "reward", "flags")


def env_seed(seed: int, actor: int, incarnation: int) -> int:
    """As documented in deploy.assemble and actors.actor: the role derives one seed, the actor its own."""
    role = child_seed(seed, "actor", actor, "incarnation", incarnation)
    return child_seed(role, "actor", actor, "incarnation", incarnation)


def wrong_rows(group: zarr.Group, slot: int, count: int, seed: int) -> dict[str, int]:
    """Rows of one slot that are not what the environment made."""
    got = {name: np.asarray(group[name][slot, :count]) for name in group.array_keys() if name[0] != "_"
           and name != "committed"}  # each [T, ...]  # fmt: skip
    actor, env, _ = group["_slots"][slot].tolist()
    wrong = dict.fromkeys(PARTS, 0)
    for incarnation in np.unique(got["incarnation"]).tolist():
        mine = got["incarnation"] == incarnation
        episode, step = (got[name][mine].astype(np.int64) for name in ("episode", "step"))
        made = counter_row(
            env_seed(seed, actor, incarnation), np.full_like(episode, env), episode, step, side=8
        )
        for name in ("image", "vector", "reward"):
            same = (got[name][mine] == made[name]).reshape(len(step), -1).all(1)
            wrong[name] += int((~same).sum())
        flags = [got[f][mine] == made[f] for f in ("is_first", "is_last", "is_terminal")]
        wrong["flags"] += int((~np.logical_and.reduce(flags)).sum())
    return wrong


def main() -> None:
    replay, seed = Path(sys.argv[1]), int(sys.argv[2])
    rows, total = 0, dict.fromkeys(PARTS, 0)
    segments = [p for p in sorted(replay.glob("shard-*/*.zarr")) if ".overlay." not in p.name]
    for path in segments:
        group = zarr.open_group(str(path), mode="r")
        committed = np.asarray(group["committed"][:])  # [S], read before the rows
        for slot in np.flatnonzero(committed).tolist():
            rows += int(committed[slot])
            for name, count in wrong_rows(group, slot, int(committed[slot]), seed).items():
                total[name] += count
    rooms = sorted({name.split(".")[0] for name in sys.modules})
    sys.stdout.write(json.dumps({"rows": rows, "wrong": total, "modules": rooms}))


if __name__ == "__main__":
    main()

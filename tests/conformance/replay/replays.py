"""What the replay conformance tests share: a table, its rows, and what a true row is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from replay import synthetic
from replay.limiter import RateLimiter
from system.experience import Chunk, StreamId

TABLE = synthetic.vector_table()
EPISODE = 50


@dataclass
class Pair:
    writer: Any
    reader: Any


Open = Callable[..., AbstractContextManager[Pair]]


def settings(**changes: Any) -> dict[str, Any]:
    base = {"batch": 4, "length": 8, "context": 1, "seed": 5, "ring": 3, "capacity_rows": 4096}
    return base | {"limiter": RateLimiter(1000.0, 0, 1_000_000, 1)} | changes


def rows(start: int, count: int, *, actor: int = 0, env: int = 0, incarnation: int = 0) -> Chunk:
    stream = StreamId(actor=actor, env=env)
    return synthetic.rows(TABLE, stream, start, count, incarnation=incarnation, episode_length=EPISODE)


def assert_true_rows(sequence: Any, actor: int = 0) -> None:
    """Every sampled row holds exactly what its identity says it must."""
    columns = sequence.columns
    numbers = synthetic.row_number(columns, EPISODE)
    for b in range(len(numbers)):
        stream = StreamId(actor=int(sequence.ids.stream[b]) >> 16, env=int(sequence.ids.stream[b]) & 0xFFFF)
        assert (np.diff(numbers[b]) == 1).all()
        wanted = synthetic.rows(TABLE, stream, int(numbers[b, 0]), numbers.shape[1], episode_length=EPISODE)
        for name, values in wanted.columns.items():
            np.testing.assert_array_equal(columns[name][b], values, err_msg=name)

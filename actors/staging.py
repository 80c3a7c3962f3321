"""Gathers rows of many streams and cuts them into chunks. Between the environment loop and the replay writer.

The newest row of an open episode is held back: should its environment break, that row becomes the
episode's last (a time limit, not a terminal) and stores see whole episodes only.
Rows are staged environment-major, so a stream's chunk is a slice and is never copied.
Letters: N environments, n rows of one recv, T rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from actors.loop import LoopStep
from system.errors import DivergedError, SchemaError
from system.experience import Chunk, StreamId
from system.specs import RESERVED, ArraySpec, TableSpec

Array = NDArray[np.generic]
Where = tuple[slice, int] | tuple[NDArray[np.int32], NDArray[np.intp]]  # the rows [n] inside [N, T]


class Staging:
    """Room for `chunk_rows` rows of each of N streams, numbered by (incarnation, episode, step)."""

    def __init__(
        self,
        actor: int,
        incarnation: int,
        num_envs: int,
        table: TableSpec,
        policy_columns: Mapping[str, ArraySpec],
        chunk_rows: int,
    ) -> None:
        """Raises: SchemaError when the policy does not fill exactly the table's overlay columns."""
        if dict(policy_columns) != dict(table.overlay):
            raise SchemaError(
                f"the policy fills columns {sorted(policy_columns)}, the table has overlay columns "
                f"{sorted(table.overlay)}; both must be the same with equal shapes and dtypes: "
                "build the table from this policy"
            )
        self._streams = [StreamId(actor=actor, env=i) for i in range(num_envs)]
        self._incarnation = incarnation
        self._num_envs = num_envs
        self._capacity = chunk_rows + 1  # and the row held back
        self._specs = table.all
        self._obs = tuple(table.columns.keys() - RESERVED)
        self._ids = np.arange(num_envs, dtype=np.int32)
        self._extras = tuple(name for name, spec in table.overlay.items())
        self._floats = tuple(n for n, s in table.overlay.items() if np.dtype(s.dtype).kind == "f")
        self._episode = np.full(num_envs, -1, np.int32)  # [N]
        self._step = np.zeros(num_envs, np.int32)  # [N]
        self._fill = np.zeros(num_envs, np.intp)  # [N]
        self._open = np.zeros(num_envs, np.bool_)  # [N], newest row was not is_last
        self._rows = self._fresh()  # each [N, T, ...]
        self.rows = 0

    def _fresh(self) -> dict[str, Array]:
        shape = (self._num_envs, self._capacity)
        rows: dict[str, Array] = {
            name: (np.zeros if name in self._floats else np.empty)((*shape, *spec.shape), spec.dtype)
            for name, spec in self._specs.items()
        }
        rows["incarnation"][...] = self._incarnation
        return rows

    @property
    def full(self) -> bool:
        """Whether some stream has no room for another row."""
        return bool(self._fill.max() >= self._capacity)

    def add(self, rows: LoopStep) -> None:
        """Stage rows [n]. Raises: SchemaError for columns of another shape or dtype than the table's."""
        step = rows.step
        ids = step.env_id
        assert (self._fill[ids] < self._capacity).all(), (self._fill, self._capacity)
        if (abandoned := ids[step.is_first & self._open[ids]]).size:
            self._rows["is_last"][abandoned, self._fill[abandoned] - 1] = True
            self._rows["action"][abandoned, self._fill[abandoned] - 1] = 0
        self._open[ids] = ~step.is_last
        self._episode[ids] += step.is_first
        self._step[ids] = np.where(step.is_first, 0, self._step[ids] + 1)
        at = self._fill[ids]
        n = len(step)
        # Slices write faster than index arrays, and lockstep environments always allow them.
        lockstep = n == self._num_envs and bool((at == at[0]).all()) and bool((ids == self._ids).all())
        where = (slice(None), int(at[0])) if lockstep else (ids, at)
        for name in self._obs:
            self._put(name, where, step.obs[name], n)
        self._put("action", where, rows.action, n)
        for name in self._extras:
            if name not in rows.extras:
                raise SchemaError(
                    f"the policy gave no column {name!r} though it declares it; mend Policy.act"
                )
            self._put(name, where, rows.extras[name], n)
        own = self._rows
        own["reward"][where] = step.reward
        own["is_first"][where] = step.is_first
        own["is_last"][where] = step.is_last
        own["is_terminal"][where] = step.is_terminal
        own["episode"][where] = self._episode[ids]
        own["step"][where] = self._step[ids]
        own["policy_version"][where] = rows.version.encoded
        self._fill[ids] = at + 1
        self.rows += n

    def _put(self, name: str, where: Where, value: Array, n: int) -> None:
        target = self._rows[name]
        if value.shape != (n, *target.shape[2:]) or value.dtype != target.dtype:
            raise SchemaError(
                f"column {name!r} has shape {value.shape} dtype {value.dtype}, the table wants "
                f"{(n, *target.shape[2:])} {target.dtype}; mend the policy or environment that made it"
            )
        target[where] = value

    def flush(self, *, everything: bool = False) -> list[Chunk]:
        """Cut one chunk per stream that has rows to give; `everything` includes those held back.

        Raises: DivergedError when a policy column holds NaN or infinity.
        """
        for name in self._floats:
            if not np.isfinite(self._rows[name]).all():  # rows not filled are zeros
                raise DivergedError(f"policy column {name!r} holds NaN or infinity; roll the learner back")
        chunks: list[Chunk] = []
        held = np.zeros_like(self._open) if everything else self._open & (self._fill > 0)  # [N]
        give = self._fill - held  # [N]
        for env in np.flatnonzero(give):
            columns = {name: rows[env, : give[env]] for name, rows in self._rows.items()}  # [T, ...]
            chunks.append(Chunk(stream=self._streams[env], columns=columns))
        old, self._rows = self._rows, self._fresh()  # never reused: a writer may keep the chunks
        keep = np.flatnonzero(held)
        for name, rows in self._rows.items():
            rows[keep, 0] = old[name][keep, give[keep]]
        self._fill[:] = held
        self.rows = len(keep)
        return chunks

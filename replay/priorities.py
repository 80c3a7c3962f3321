"""What replaying is worth, per block of 64 rows: written by the learner, drawn from by cumulative sums.

Flat arrays in the order of `replay.starts.Blocks`: no tree, no loop over blocks. arXiv 1511.05952 defines
proportional priorities and importance weights; blocks, staleness and the value of new blocks are ours.
Letters: F fragments, E blocks, B batch, L rows.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replay.starts import BLOCK_ROWS, Blocks
from system.errors import SchemaError

FLOOR = 1e-6
"""Added to every priority: what was fully learned may still be drawn."""
PART_BLOCKS = 1024
"""Blocks that are encoded together in the state; parts without news are not encoded again."""
UNKNOWN = np.float32(-1.0)
NO_BLOCKS = Blocks(*(np.zeros(0, np.int64) for _ in Blocks._fields))


def check_priority(priority: NDArray[Any], batch: int) -> None:
    """Raises: SchemaError unless float32 [B, L], finite and >= 0."""
    if priority.dtype != np.float32 or priority.ndim != 2 or len(priority) != batch:
        raise SchemaError(
            f"priority is {priority.dtype}{list(priority.shape)}, must be float32[{batch}, L]; cast it"
        )
    if not (np.isfinite(priority).all() and (priority >= 0).all()):
        raise SchemaError("priority must be finite and >= 0; pass magnitudes of errors, none when one is NaN")


class BlockPriorities:
    """The priority of every live block. Follows a StartIndex; what is evicted leaves.

    A block that was never written counts as the highest known one, so new rows are tried soon. With a
    `half_life` (in draws), what is known of a block fades towards that as well: half the distance each half
    life, so none is forgotten because it was dull when the model was young.
    """

    def __init__(self, exponent: float, half_life: float = 0.0) -> None:
        self._exponent = exponent
        self._half_life = half_life
        self._places: dict[tuple[int, int], list[int]] = {}  # fragments of a stream
        self._layout = NO_BLOCKS
        self._offset = np.zeros(0, np.int64)  # [F], first entry of a fragment
        self._values = np.zeros(0, np.float32)  # [E], UNKNOWN where never written
        self._scaled = np.zeros(0, np.float32)  # [E], (value + FLOOR) ** exponent, UNKNOWN likewise
        self._written = np.zeros(0, np.int32)  # [E], when
        self._clock = 0
        self._parts: dict[int, tuple[str, str]] = {}
        self._table: list[list[int]] = []  # shard, stream, first block and blocks of the fragments

    def follow(self, blocks: Blocks) -> None:
        """Take up new blocks, let evicted ones go."""
        old, self._layout = self._layout, blocks
        if all(np.array_equal(a, b) for a, b in zip(old[:4], blocks[:4], strict=True)):
            return
        origin = self._origins(old, blocks)
        known = origin >= 0
        size = len(origin)
        for name, empty in (("_values", UNKNOWN), ("_scaled", UNKNOWN), ("_written", np.int32(0))):
            array = getattr(self, name)
            fresh = np.full(size, empty)
            fresh[known] = array[origin[known]]
            setattr(self, name, fresh)
        self._offset = np.cumsum(blocks.number) - blocks.number
        self._places = {}
        for f, key in enumerate(zip(blocks.shard.tolist(), blocks.stream.tolist(), strict=True)):
            self._places.setdefault(key, []).append(f)
        self._parts.clear()
        self._table = np.stack(blocks[:4], 1).tolist()

    def weights(self) -> NDArray[np.float32]:
        """Scaled priority of every block [E]: what a start's probability is proportional to."""
        known = self._scaled >= 0
        top = self._scaled.max(initial=0.0, where=known) or np.float32(1.0)
        if not self._half_life:
            return np.where(known, self._scaled, top)
        fade = np.exp2((self._written - self._clock) / np.float32(self._half_life), dtype=np.float32)
        return np.where(known, top + (self._scaled - top) * fade, top)

    def tick(self) -> None:
        """One more draw: what ages are counted in."""
        self._clock += 1

    def write(
        self,
        shard: NDArray[np.integer[Any]],
        stream: NDArray[np.integer[Any]],
        start: NDArray[np.int64],
        priority: NDArray[np.float32],
        step: int = 1,
    ) -> int:
        """A block's priority becomes the mean over its rows in `priority` [B, L]; return rows that are gone.

        Row i of sequence b lies at start[b] + i * step.
        """
        position = start[:, None] + np.arange(priority.shape[1]) * step  # [B, L]
        entry = self._entries(shard, stream, position // BLOCK_ROWS)
        live = entry >= 0
        touched, group = np.unique(entry[live], return_inverse=True)
        values = np.bincount(group, priority[live], len(touched)) / np.bincount(group, minlength=len(touched))
        self._values[touched] = values
        self._scaled[touched] = self._scale(self._values[touched])
        self._written[touched] = self._clock
        for part in np.unique(touched // PART_BLOCKS).tolist():
            self._parts.pop(part, None)
        return int(live.size - live.sum())

    def _scale(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return (values + np.float32(FLOOR)) ** np.float32(self._exponent)

    def _entries(
        self, shard: NDArray[np.integer[Any]], stream: NDArray[np.integer[Any]], block: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The entry of each block number [B, L], -1 where it is not live."""
        entry = np.full(block.shape, -1, np.int64)
        first, count = self._layout.first, self._layout.number
        for b, key in enumerate(zip(shard.tolist(), stream.tolist(), strict=True)):
            for f in self._places.get(key, ()):
                inside = block[b] - first[f]
                here = (inside >= 0) & (inside < count[f])
                entry[b, here] = inside[here] + self._offset[f]
        return entry

    def _origins(self, old: Blocks, new: Blocks) -> NDArray[np.int64]:
        """For each new entry the old one of the same block, -1 for a new block [E]."""
        size = int(new.number.sum())
        fragment = np.repeat(np.arange(len(new.number)), new.number)  # [E]
        block = np.arange(size) - (np.cumsum(new.number) - new.number - new.first)[fragment]
        if np.array_equal(old.shard, new.shard) and np.array_equal(old.stream, new.stream):
            inside = block - old.first[fragment]
            live = (inside >= 0) & (inside < old.number[fragment])
            return np.where(live, inside + self._offset[fragment], -1)
        origin = np.full(size, -1, np.int64)
        at = np.cumsum(new.number) - new.number
        for f, key in enumerate(zip(new.shard.tolist(), new.stream.tolist(), strict=True)):
            here = slice(at[f], at[f] + new.number[f])
            for o in self._places.get(key, ()):
                inside = block[here] - old.first[o]
                live = (inside >= 0) & (inside < old.number[o])
                origin[here][live] = inside[live] + self._offset[o]
        return origin

    # ---- checkpoint -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON values, 11 bytes per block: the arrays in base64, in parts of which only new ones cost."""
        parts = range(0, len(self._values), PART_BLOCKS)
        for number, begin in enumerate(parts):
            if number not in self._parts:
                here = slice(begin, begin + PART_BLOCKS)
                self._parts[number] = (_encode(self._values[here]), _encode(self._written[here]))
        encoded = [self._parts[number] for number in range(len(parts))]
        return {
            "clock": self._clock,
            "fragments": self._table,
            "values": [values for values, _ in encoded],
            "written": [written for _, written in encoded],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up saved priorities; the next `follow` fits them to what is live then."""
        table = np.asarray(state["fragments"], np.int64).reshape(-1, 4).T
        size = int(table[3].sum())
        self.follow(NO_BLOCKS)
        self.follow(Blocks(table[0], table[1], table[2], table[3], np.zeros(size, np.int64)))
        self._clock = int(state["clock"])
        self._values = _decode(state["values"], np.float32, size)
        self._written = _decode(state["written"], np.int32, size)
        known = self._values >= 0
        self._scaled = np.full(size, UNKNOWN)
        self._scaled[known] = self._scale(self._values[known])


def _encode(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _decode(parts: list[str], dtype: type[Any], size: int) -> NDArray[Any]:
    values = np.frombuffer(b"".join(base64.b64decode(part) for part in parts), dtype).copy()
    if len(values) != size:
        raise SchemaError(
            f"saved priorities of {len(values)} blocks must be of {size}; take another checkpoint"
        )
    return values

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
SCALED = (1e-30, 1e30)
"""Bounds of a priority to the power of the exponent."""
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


class _Entries:
    """The flat numbering of the blocks of one moment, in canonical order."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.size = int(blocks.number.sum())
        self.offset = np.cumsum(blocks.number) - blocks.number  # [F], first entry of a fragment
        self.places: dict[tuple[int, int], list[int]] = {}  # fragments of a stream
        for f, key in enumerate(zip(blocks.shard.tolist(), blocks.stream.tolist(), strict=True)):
            self.places.setdefault(key, []).append(f)
        self.twins = self._twins()

    def find(self, key: tuple[int, int], block: NDArray[np.int64], into: NDArray[np.int64]) -> None:
        """Put the entries of block numbers [n] of one stream in `into` [n], where they are live."""
        for f in self.places.get(key, ()):
            inside = block - self.blocks.first[f]
            here = (inside >= 0) & (inside < self.blocks.number[f])
            into[here] = inside[here] + self.offset[f]

    def origins(self, new: _Entries) -> NDArray[np.int64]:
        """The entry here of each entry of `new` [E], -1 where the block is new."""
        fragment = np.repeat(np.arange(len(new.offset)), new.blocks.number)  # [E]
        block = np.arange(new.size) - (new.offset - new.blocks.first)[fragment]
        if np.array_equal(self.blocks.shard, new.blocks.shard) and np.array_equal(
            self.blocks.stream, new.blocks.stream
        ):
            inside = block - self.blocks.first[fragment]
            live = (inside >= 0) & (inside < self.blocks.number[fragment])
            return np.where(live, inside + self.offset[fragment], -1)
        origin = np.full(new.size, -1, np.int64)
        for f, key in enumerate(zip(new.blocks.shard.tolist(), new.blocks.stream.tolist(), strict=True)):
            here = slice(new.offset[f], new.offset[f] + new.blocks.number[f])
            self.find(key, block[here], origin[here])
        return origin

    def _twins(self) -> list[int]:
        """Entries e, the last first, of the same block as e + 1: a gap of the stream lies inside it."""
        blocks = self.blocks
        end = blocks.first + blocks.number - 1  # [F], the last block
        same = (blocks.shard[1:] == blocks.shard[:-1]) & (blocks.stream[1:] == blocks.stream[:-1])
        same &= (end[:-1] == blocks.first[1:]) & (blocks.number[:-1] > 0)
        return (self.offset[1:][same] - 1)[::-1].tolist()


class BlockPriorities:
    """The priority of every live block. Follows a StartIndex; what is evicted leaves.

    A block that was never written counts as the highest known one, so new rows are tried soon. With a
    `half_life` (in draws), what is known of a block fades towards that as well: half the distance each half
    life, so none is forgotten because it was dull when the model was young.
    """

    def __init__(self, exponent: float, half_life: float = 0.0) -> None:
        self._exponent = exponent
        self._half_life = half_life
        self._entries = _Entries(NO_BLOCKS)
        self._values = np.zeros(0, np.float32)  # [E], UNKNOWN where never written
        self._scaled = np.zeros(0, np.float32)  # [E], (value + FLOOR) ** exponent, UNKNOWN likewise
        self._written = np.zeros(0, np.int32)  # [E], when
        self._clock = 0
        self._saved: tuple[_Entries, NDArray[np.float32], NDArray[np.int32]] | None = None
        self._parts: dict[int, tuple[str, str]] = {}
        self._table: list[list[int]] = []  # shard, stream, first block and blocks of the fragments

    def follow(self, blocks: Blocks) -> None:
        """Take up new blocks, let evicted ones go."""
        old = self._entries
        if all(np.array_equal(a, b) for a, b in zip(old.blocks[:4], blocks[:4], strict=True)):
            return
        self._entries = new = _Entries(blocks)
        values, written = np.full(new.size, UNKNOWN), np.zeros(new.size, np.int32)
        sources = [(old, self._values, self._written)] if self._saved is None else [self._saved]
        if self._saved is not None:  # a block that is checked late after a restart still has its priority
            sources.append((old, self._values, self._written))
        for entries, its_values, its_written in sources:
            origin = entries.origins(new)
            known = origin >= 0
            known[known] = its_values[origin[known]] >= 0
            values[known], written[known] = its_values[origin[known]], its_written[origin[known]]
        self._set(values, written)

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
        block = (start[:, None] + np.arange(priority.shape[1]) * step) // BLOCK_ROWS  # [B, L]
        entry = np.full(block.shape, -1, np.int64)
        for b, key in enumerate(zip(shard.tolist(), stream.tolist(), strict=True)):
            self._entries.find(key, block[b], entry[b])
        live = entry >= 0
        touched, group = np.unique(entry[live], return_inverse=True)
        values = np.bincount(group, priority[live], len(touched)) / np.bincount(group, minlength=len(touched))
        self._values[touched] = values
        self._scaled[touched] = self._scale(self._values[touched])
        self._written[touched] = self._clock
        for at in self._entries.twins:
            for array in (self._values, self._scaled, self._written):
                array[at] = array[at + 1]
            self._parts.pop(at // PART_BLOCKS, None)
        for part in np.unique(touched // PART_BLOCKS).tolist():
            self._parts.pop(part, None)
        return int(live.size - live.sum())

    def _scale(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        # Beyond these bounds sums over blocks would be 0 or infinite, and every weight NaN.
        return np.clip((values.astype(np.float64) + FLOOR) ** self._exponent, *SCALED).astype(np.float32)

    def _set(self, values: NDArray[np.float32], written: NDArray[np.int32]) -> None:
        known = values >= 0
        self._values, self._written = values, written
        self._scaled = np.full(len(values), UNKNOWN)
        self._scaled[known] = self._scale(values[known])
        self._parts.clear()
        self._table = np.stack(self._entries.blocks[:4], 1).tolist()

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
        self._entries = _Entries(Blocks(table[0], table[1], table[2], table[3], np.zeros(size, np.int64)))
        self._clock = int(state["clock"])
        values = _decode(state["values"], np.float32, size)
        written = _decode(state["written"], np.int32, size)
        self._set(values, written)
        self._saved = (self._entries, values.copy(), written.copy())


def _encode(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _decode(parts: list[str], dtype: type[Any], size: int) -> NDArray[Any]:
    values = np.frombuffer(b"".join(base64.b64decode(part) for part in parts), dtype).copy()
    if len(values) != size:
        raise SchemaError(
            f"saved priorities of {len(values)} blocks must be of {size}; take another checkpoint"
        )
    return values

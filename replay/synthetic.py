"""Rows whose every byte follows from (stream, incarnation, row number): for tests, fault drills and benches.

Whoever reads a row back can compute what it must hold, and images do not compress.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.experience import Chunk, StreamId
from system.specs import ActionSpec, ArraySpec, EnvSpec, TableSpec


def image_table(size: int = 64, vector: int = 24) -> TableSpec:
    """Rows of an image, a vector and a continuous action, with one overlay column."""
    env = EnvSpec(
        name="synthetic",
        obs={
            "image": ArraySpec(shape=(size, size, 3), dtype="uint8", kind="image"),
            "vector": ArraySpec(shape=(vector,), dtype="float32"),
        },
        action=ActionSpec(kind="continuous", size=6),
    )
    return TableSpec.of(env, {"latent": ArraySpec(shape=(8,), dtype="uint16")})


def vector_table(vector: int = 4) -> TableSpec:
    """Small rows: a vector, a direction and a discrete action, with one overlay column."""
    env = EnvSpec(
        name="synthetic",
        obs={
            "vector": ArraySpec(shape=(vector,), dtype="float32"),
            "direction": ArraySpec(shape=(), dtype="int32", kind="discrete", classes=4),
        },
        action=ActionSpec(kind="discrete", classes=(3,)),
    )
    return TableSpec.of(env, {"latent": ArraySpec(shape=(2,), dtype="uint16")})


def rows(
    table: TableSpec,
    stream: StreamId,
    start: int,
    count: int,
    *,
    incarnation: int = 0,
    episode_length: int = 50,
) -> Chunk:
    """Rows start .. start + count - 1 of one incarnation of a stream, in episodes of equal length."""
    number = np.arange(start, start + count, dtype=np.uint64)  # [T]
    seed = _mix(number + np.uint64((incarnation << 40) + (stream.actor << 32) + (stream.env << 24)))
    step = (number % np.uint64(episode_length)).astype(np.int32)
    columns: dict[str, NDArray[Any]] = {name: _fill(spec, seed, name) for name, spec in table.all.items()}
    columns |= {
        "is_first": step == 0,
        "is_last": step == episode_length - 1,
        "is_terminal": (step == episode_length - 1)
        & (number // np.uint64(episode_length) % np.uint64(2) == 0),
        "incarnation": np.full(count, incarnation, np.int32),
        "episode": (number // np.uint64(episode_length)).astype(np.int32),
        "step": step,
        "policy_version": number.astype(np.int64) // 10,
    }
    columns["reward"] = np.where(columns["is_first"], np.float32(0), columns["reward"])
    return Chunk(stream=stream, columns=columns)


def row_number(columns: dict[str, NDArray[Any]], episode_length: int = 50) -> NDArray[np.int64]:
    """Invert `rows`: the row numbers behind identity columns of any shape."""
    return columns["episode"].astype(np.int64) * episode_length + columns["step"]


def _fill(spec: ArraySpec, seed: NDArray[np.uint64], name: str) -> NDArray[Any]:
    entries = int(np.prod(spec.shape, dtype=np.int64))
    salt = np.uint64(sum(name.encode()))
    words = seed[:, None] + np.arange(entries, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    noise = _mix(words) >> np.uint64(33)  # [T, entries], 31 bits
    if spec.dtype.startswith("float"):
        values = (noise.astype(np.float64) / 2**31).astype(spec.dtype)
    elif spec.classes:
        values = (noise % np.uint64(spec.classes)).astype(spec.dtype)
    elif name == "action":
        values = (noise % np.uint64(3)).astype(spec.dtype)
    else:
        values = noise.astype(spec.dtype)
    return values.reshape(len(seed), *spec.shape)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit avalanche: xor-shift and multiply, twice."""
    words = (words ^ (words >> np.uint64(31))) * np.uint64(0x7FB5D329728EA185)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x81DADEF4BC2DD44D)
    return words ^ (words >> np.uint64(33))

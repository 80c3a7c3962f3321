"""Chunk files as the DreamerV3 reference code writes them: chains are followed, cut at is_first."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay.datasets.export import open_files
from replay.datasets.ingest import import_dataset
from replay.datasets.npz_chunks import ChunkEpisodes
from system.errors import SchemaError


def stream(lengths: list[int], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    first = np.zeros(rows, np.bool_)
    first[np.cumsum([0, *lengths[:-1]])] = True
    last = np.roll(first, -1)
    return {
        "image": rng.integers(0, 255, (rows, 4, 4, 3)).astype(np.uint8),
        "action": rng.integers(0, 3, rows).astype(np.int32),
        "reward": np.where(first, 0, rng.random(rows)).astype(np.float32),
        "is_first": first,
        "is_last": last,
        "is_terminal": last & (rng.random(rows) < 0.5),
        "stepid": rng.integers(0, 255, (rows, 20)).astype(np.uint8),
        "dyn/deter": rng.random((rows, 8)).astype(np.float32),
        "consec": np.arange(rows, dtype=np.int32),
    }


def write_chain(directory: Path, rows: dict[str, Any], size: int, tag: str) -> None:
    total = len(rows["reward"])
    bounds = [*range(0, total, size), total]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        following = f"{tag}{number + 1}" if end < total else "0"
        name = f"2026{number:04d}T0F0-{tag}{number}-{following}-{end - begin}.npz"
        np.savez_compressed(directory / name, **{key: values[begin:end] for key, values in rows.items()})


def test_chains_become_the_episodes_they_hold(tmp_path: Path) -> None:
    streams = {"x": stream([30, 7, 41], 0), "y": stream([5, 60], 1)}
    (tmp_path / "d").mkdir()
    for tag, rows in streams.items():
        write_chain(tmp_path / "d", rows, 16, tag)
    source = open_files(tmp_path / "d", {}, ())
    assert isinstance(source, ChunkEpisodes)
    assert sorted(source.about.obs) == ["image"]
    found = list(source)
    assert sorted(map(len, found)) == [5, 7, 30, 41, 60]
    for key in ("image", "reward", "is_terminal"):
        expected = np.concatenate([rows[key] for rows in streams.values()])
        assert np.array_equal(np.concatenate([e.columns[key] for e in found]), expected)
    assert import_dataset(source, tmp_path / "r").rows == 143


def test_cut_off_chains_lose_only_their_broken_episodes(tmp_path: Path) -> None:
    write_chain(tmp_path, stream([30, 7, 41], 0), 16, "x")
    sorted(tmp_path.glob("*-x0-*"))[0].unlink()
    sorted(tmp_path.glob("*-x4-0-*"))[0].unlink()
    source = ChunkEpisodes(tmp_path)
    assert [len(e) for e in source] == [7]
    assert source.tally.skipped == {
        "episode without its beginning": 14,
        "episode without its end": 27,
    }


def test_successors_in_a_circle_are_refused(tmp_path: Path) -> None:
    rows = stream([8], 0)
    for name in ("1-a-b-8.npz", "2-b-a-8.npz"):
        np.savez(tmp_path / name, **rows)
    with pytest.raises(SchemaError, match="circle"):
        ChunkEpisodes(tmp_path)

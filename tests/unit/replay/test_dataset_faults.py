"""Bad datasets are refused at the door, naming file, key, rule and remedy; nothing of them is imported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay.datasets.export import open_files
from replay.datasets.ingest import import_dataset
from replay.datasets.npz import write_arrays
from system.errors import DreamfleetError

Columns = dict[str, Any]


def arrays(rows: int = 6) -> Columns:
    step = np.arange(rows)
    return {
        "vector": np.linspace(0, 1, rows * 3, dtype=np.float32).reshape(rows, 3),
        "image": np.arange(rows * 12, dtype=np.uint8).reshape(rows, 2, 2, 3),
        "action": (step % 2).astype(np.int64),
        "reward": np.where(step == 0, 0, 0.5).astype(np.float32),
        "is_first": step == 0,
        "is_last": step == rows - 1,
        "is_terminal": step == rows - 1,
    }


def two_files(directory: Path, change: Callable[[Columns], None]) -> None:
    """A good episode and one that `change` spoils."""
    directory.mkdir()
    write_arrays(directory / "a.npz", arrays())
    spoiled = arrays()
    change(spoiled)
    write_arrays(directory / "b.npz", spoiled)


def take(directory: Path, target: Path) -> None:
    source = open_files(directory, {}, ())
    assert source is not None
    import_dataset(source, target)


def refusal(directory: Path) -> str:
    target = directory.with_name("imported")
    with pytest.raises(DreamfleetError) as refused:
        take(directory, target)
    assert not target.exists()
    assert not list(target.parent.glob(".*partial"))
    return str(refused.value)


def test_a_good_folder_of_npz_files_is_understood(tmp_path: Path) -> None:
    two_files(tmp_path / "d", lambda columns: None)
    source = open_files(tmp_path / "d", {}, ())
    assert source is not None
    assert source.about.obs["image"].kind == "image"
    assert source.about.action is not None
    assert source.about.action.classes == (2,)
    assert import_dataset(source, tmp_path / "r").rows == source.rows == 12


def put(key: str, value: Any) -> Callable[[Columns], None]:
    return lambda columns: columns.__setitem__(key, value)


def spoil(key: str, row: int, value: Any) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[key][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("reward"), ["b.npz", "reward", "--drop"]),
        (put("extra", np.zeros(6, np.float32)), ["b.npz", "extra", "--drop extra"]),
        (put("vector", np.zeros((6, 4), np.float32)), ["b.npz", "vector", "[T', 4]".replace("T'", "'T'")]),
        (put("vector", np.zeros((6, 3), np.float64)), ["b.npz", "vector", "float64"]),
        (spoil("vector", 2, np.nan), ["b.npz", "vector", "NaN", "row 2"]),
        (spoil("reward", 3, np.inf), ["b.npz", "reward", "row 3"]),
        (spoil("reward", 0, 1.0), ["b.npz", "reward of row 0", "arriving"]),
        (spoil("is_last", 2, True), ["b.npz", "is_last"]),
        (spoil("is_last", 5, False), ["b.npz", "is_last"]),
        (spoil("is_first", 0, False), ["b.npz", "is_first"]),
        (spoil("is_terminal", 1, True), ["b.npz", "is_terminal"]),
        (spoil("action", 1, -1), ["b.npz", "action", "count from 0"]),
        (spoil("action", 1, 1 << 40), ["action", "int32"]),
        (put("reward", np.zeros(5, np.float32)), ["b.npz", "lengths", "one row per step"]),
        (lambda c: c.update({k: v[:0] for k, v in c.items()}), ["b.npz", "no rows"]),
    ],
)  # fmt: skip
def test_a_spoiled_episode_is_refused_by_name(tmp_path: Path, change: Any, words: list[str]) -> None:
    two_files(tmp_path / "d", change)
    message = refusal(tmp_path / "d")
    assert [word for word in words if word not in message] == [], message


def test_one_array_of_another_length_among_reserved_names(tmp_path: Path) -> None:
    two_files(tmp_path / "d", put("step", np.arange(6)))
    write_arrays(tmp_path / "d" / "a.npz", arrays() | {"step": np.arange(6)})
    assert "--drop step" in refusal(tmp_path / "d")


def test_doubles_need_a_named_cast(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_arrays(tmp_path / "d" / "a.npz", arrays() | {"vector": np.ones((6, 3))})
    assert "--cast vector=float32" in refusal(tmp_path / "d")
    source = open_files(tmp_path / "d", {"vector": "float32"}, ())
    assert source is not None
    assert import_dataset(source, tmp_path / "ok").episodes == 1


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d" / "a.npz", **arrays(), who=np.array([{"a": 1}] * 6, dtype=object))
    message = refusal(tmp_path / "d")
    assert "a.npz" in message
    assert "who" in message
    assert "pickled" in message


def test_a_pickle_named_npz_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "a.npy", np.array([arrays()], dtype=object))
    (tmp_path / "d" / "a.npy").rename(tmp_path / "d" / "a.npz")
    assert "cannot be read as npz" in refusal(tmp_path / "d")


@pytest.mark.parametrize("cut", [10, 300, -30])
def test_a_truncated_npz_is_refused(tmp_path: Path, cut: int) -> None:
    two_files(tmp_path / "d", lambda columns: None)
    data = (tmp_path / "d" / "b.npz").read_bytes()
    (tmp_path / "d" / "b.npz").write_bytes(data[:cut])
    assert "b.npz" in refusal(tmp_path / "d")


def test_a_flipped_byte_in_an_npz_is_refused(tmp_path: Path) -> None:
    two_files(tmp_path / "d", lambda columns: None)
    data = bytearray((tmp_path / "d" / "b.npz").read_bytes())
    at = data.index(arrays()["vector"].tobytes())
    data[at + 5] ^= 1
    (tmp_path / "d" / "b.npz").write_bytes(data)
    message = refusal(tmp_path / "d")
    assert "b.npz" in message
    assert "vector" in message
    assert "CRC" in message


def exported(tmp_path: Path, form: Any) -> Path:
    from replay.datasets.export import SINKS, export_dataset

    two_files(tmp_path / "d", lambda columns: None)
    source = open_files(tmp_path / "d", {}, ())
    assert source is not None
    export_dataset(source, tmp_path / form, SINKS[form])
    return tmp_path / form


@pytest.mark.parametrize("form", ["npz", "zarr"])
def test_a_missing_file_of_our_own_is_noticed(tmp_path: Path, form: str) -> None:
    path = exported(tmp_path, form)
    victim = next(
        p for p in sorted(path.rglob("*")) if p.is_file() and ("episode-" in p.name or "/c/" in str(p))
    )
    victim.unlink()
    assert victim.name in refusal(path)


@pytest.mark.parametrize("form", ["npz", "zarr"])
def test_a_damaged_description_is_refused(tmp_path: Path, form: str) -> None:
    path = exported(tmp_path, form)
    file = path / ("dataset.json" if form == "npz" else "zarr.json")
    value = json.loads(file.read_text())
    about = value["about"] if form == "npz" else value["attributes"]["dreamfleet"]["about"]
    del about["obs"]
    file.write_text(json.dumps(value))
    assert "does not describe a dataset" in refusal(path)
    file.write_text(file.read_text()[:40])
    refusal(path)


def test_a_flipped_byte_in_a_zarr_chunk_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, "zarr")
    victim = path / "image" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0x10
    victim.write_bytes(data)
    assert "image rows" in refusal(path)


def test_an_episode_index_that_overlaps_is_refused(tmp_path: Path) -> None:
    import zarr

    path = exported(tmp_path, "zarr")
    starts: Any = zarr.open_group(path)["episode_start"]
    starts[1] = 3
    message = refusal(path)
    assert "without gap or overlap" in message or "bytes" in message

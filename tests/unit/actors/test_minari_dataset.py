"""Minari in and out: the library itself reads what we write, and we read what it writes, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("minari", reason="extra datasets")
pytest.importorskip("h5py", reason="extra datasets")

import minari
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from actors.minari_dataset import LEAST_ROWS, MinariEpisodes, MinariSink, action_spec_of, is_minari
from replay.datasets.episodes import About, Episode
from replay.datasets.export import export_dataset
from replay.datasets.ingest import import_dataset
from replay.datasets.table import TableEpisodes
from system.errors import ConfigError, DreamfleetError, SchemaError
from system.specs import ActionSpec, ArraySpec

OBS = {
    "image": ArraySpec(
        shape=(40, 40, 3), dtype="uint8", kind="image"
    ),  # large enough for Minari's JPEG coding
    "vector": ArraySpec(shape=(3,), dtype="float32"),
    "goal": ArraySpec(shape=(2,), dtype="int32", kind="discrete", classes=5),
    "battery": ArraySpec(shape=(), dtype="float32"),
}
ACTIONS = {
    "one": ActionSpec(kind="discrete", classes=(4,)),
    "several": ActionSpec(kind="discrete", classes=(4, 2)),
    "continuous": ActionSpec(kind="continuous", size=2),
}


class Made:
    """Episodes of random rows; the last row's action is zero, as in replay."""

    def __init__(self, action: ActionSpec | None, lengths: list[int]) -> None:
        self.about = About(name="made", obs=OBS, action=action, extras=("policy_version",))
        self.rows = sum(lengths)
        self._lengths = lengths

    def __iter__(self) -> Iterator[Episode]:
        rng = np.random.default_rng(0)
        for number, rows in enumerate(self._lengths):
            step = np.arange(rows)
            columns: dict[str, Any] = {
                "image": rng.integers(0, 256, (rows, 40, 40, 3)).astype(np.uint8),
                "vector": rng.standard_normal((rows, 3)).astype(np.float32),
                "goal": rng.integers(0, 5, (rows, 2)).astype(np.int32),
                "battery": rng.random(rows).astype(np.float32),
                "reward": np.where(step == 0, 0, rng.standard_normal(rows)).astype(np.float32),
                "is_first": step == 0,
                "is_last": step == rows - 1,
                "is_terminal": (step == rows - 1) & (number % 2 == 0),
                "policy_version": np.arange(rows) + 7,
            }
            if self.about.action is not None:
                action = self.about.action.sample(rng, rows)
                action[-1] = 0
                columns["action"] = action
            yield Episode(name=f"episode {number}", columns=columns)


def assert_same(left: list[Episode], right: list[Episode]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for key, values in a.columns.items():
            other = b.columns[key]
            assert (values.dtype, values.shape) == (other.dtype, other.shape), key
            assert values.tobytes() == other.tobytes(), key


@pytest.mark.parametrize("kind", ACTIONS)
def test_episodes_come_back_bit_for_bit_through_a_table_too(tmp_path: Path, kind: str) -> None:
    made = Made(ACTIONS[kind], [5, 2, 9, 30])
    export_dataset(
        made, tmp_path / "made-v0", lambda p, s: MinariSink(p, s, "made-v0"), least_rows=LEAST_ROWS
    )
    assert is_minari(tmp_path / "made-v0")
    found = MinariEpisodes(tmp_path / "made-v0")
    assert found.about == made.about
    assert found.rows == made.rows
    assert_same(list(made), list(found))
    import_dataset(found, tmp_path / "table")
    assert_same(list(made), list(TableEpisodes(tmp_path / "table", "made", ACTIONS[kind])))


def test_minari_itself_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(ACTIONS["one"], [5, 9])
    export_dataset(
        made, tmp_path / "made-v0", lambda p, s: MinariSink(p, s, "made-v0"), least_rows=LEAST_ROWS
    )
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("made-v0")
    assert dataset.total_episodes == 2
    assert dataset.total_steps == 4 + 8
    for theirs, ours in zip(dataset.iterate_episodes(), made, strict=True):
        assert len(theirs.observations["vector"]) == len(theirs.rewards) + 1
        assert np.array_equal(theirs.observations["image"], ours.columns["image"])
        assert np.array_equal(theirs.actions, ours.columns["action"][:-1, 0])
        assert np.array_equal(theirs.rewards, ours.columns["reward"][1:])
        assert bool(theirs.terminations[-1]) == bool(ours.columns["is_terminal"][-1])
        assert bool(theirs.truncations[-1]) != bool(theirs.terminations[-1])


def foreign(
    directory: Path, *, actions: Any, space: Any, rewards: list[float] | None = None, **ends: Any
) -> Path:
    """One episode of 4 steps as another program would store it: a plain Box, doubles, no note of ours."""
    directory.mkdir()
    storage = MinariStorage.new(
        directory / "data", spaces.Box(-np.inf, np.inf, (2,), np.float64), space, data_format="hdf5"
    )
    buffer: dict[str, Any] = {
        "observations": np.arange(10.0).reshape(5, 2),
        "actions": actions,
        "rewards": rewards or [1.0, 2.0, 3.0, 4.0],
        "terminations": [False, False, False, True],
        "truncations": [False] * 4,
        "infos": {},
    }
    storage.update_episodes([EpisodeBuffer(**(buffer | ends))])
    return directory


def test_foreign_episodes_become_rows_as_adapters_make_them(tmp_path: Path) -> None:
    box = spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64)
    native = np.array([[-2.0, 0.0], [0.0, 5.0], [2.0, 10.0], [1.0, 7.5]])
    found = MinariEpisodes(foreign(tmp_path / "d", actions=native, space=box))
    (episode,) = found
    columns = episode.columns
    assert columns["vector"].dtype == np.float32
    assert columns["vector"].tolist() == np.arange(10.0).reshape(5, 2).tolist()
    assert columns["action"].tolist() == [[-1, -1], [0, 0], [1, 1], [0.5, 0.5], [0, 0]]
    assert columns["reward"].tolist() == [0, 1, 2, 3, 4]
    assert columns["is_terminal"].tolist() == columns["is_last"].tolist() == [False] * 4 + [True]
    assert import_dataset(found, tmp_path / "r").rows == 5


def test_discrete_actions_are_counted_from_zero(tmp_path: Path) -> None:
    path = foreign(tmp_path / "d", actions=np.array([5, 6, 7, 5]), space=spaces.Discrete(3, start=5))
    (episode,) = MinariEpisodes(path)
    assert episode.columns["action"][:, 0].tolist() == [0, 1, 2, 0, 0]
    assert action_spec_of("d", spaces.MultiBinary(3)).classes == (2, 2, 2)
    with pytest.raises(ConfigError, match="unbounded"):
        action_spec_of("d", spaces.Box(-np.inf, np.inf, (1,)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"terminations": [True, False, False, True]}, "before its last step"),
        ({"observations": np.full((5, 2), np.nan)}, "NaN"),
        ({"rewards": [1.0, np.inf, 0.0, 0.0]}, "reward holds NaN"),
        ({"actions": np.array([0, 1, 9, 0])}, "classes"),
        ({"observations": np.zeros((4, 2))}, "shape"),
        ({"truncations": [False] * 3}, "truncations"),
    ],
)
def test_faulty_episodes_are_refused_whole(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"actions": np.zeros(4, np.int64), "space": spaces.Discrete(3)} | change
    path = foreign(tmp_path / "d", **arguments)
    with pytest.raises(DreamfleetError, match=words):
        import_dataset(MinariEpisodes(path), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = foreign(tmp_path / "d", actions=np.zeros(4, np.int64), space=spaces.Discrete(3))
    file = path / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(DreamfleetError, match="cut off or damaged"):
        import_dataset(MinariEpisodes(path), tmp_path / "r")
    metadata = path / "data" / "metadata.json"
    value = json.loads(metadata.read_text())
    del value["action_space"]
    metadata.write_text(json.dumps(value))
    with pytest.raises(DreamfleetError, match="would run foreign code"):
        MinariEpisodes(path)
    metadata.write_text("{")
    with pytest.raises(DreamfleetError, match=r"metadata\.json"):
        MinariEpisodes(path)


def test_what_minari_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="action-free"):
        export_dataset(Made(None, [5]), tmp_path / "a-v0", lambda p, s: MinariSink(p, s, "a-v0"))
    with pytest.raises(ConfigError, match="name-v0"):
        export_dataset(Made(ACTIONS["one"], [5]), tmp_path / "b", lambda p, s: MinariSink(p, s, "b"))
    short = Made(ACTIONS["one"], [1, 5])
    tally = export_dataset(
        short, tmp_path / "c-v0", lambda p, s: MinariSink(p, s, "c-v0"), least_rows=LEAST_ROWS
    )
    assert (tally.episodes, tally.skipped) == (1, {"episode too short": 1})

"""`dreamfleet replay export|import|migrate`: what a person types and what comes back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from deploy.__main__ import cli
from deploy.datasets import open_replay, parse_casts
from deploy.run_dir import RunDirectory
from replay import layout, synthetic
from replay.shard import ReplayShard
from system.errors import ConfigError, DreamfleetError, SchemaError
from system.experience import StreamId
from system.specs import ActionSpec, EnvSpec, TableSpec

ENV = EnvSpec(
    name="synthetic",
    obs={key: synthetic.vector_table().columns[key] for key in ("vector", "direction")},
    action=ActionSpec(kind="discrete", classes=(3,)),
)
TABLE = TableSpec.of(ENV, {"latent": synthetic.vector_table().overlay["latent"]})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory whose replay holds three whole episodes and an open one."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.write_json(directory.env_file, ENV.to_json())
    shard = ReplayShard(directory.replay, 0, TABLE, capacity_rows=1024)
    shard.append([synthetic.rows(TABLE, StreamId(actor=0, env=0), 0, 160)], 5.0)
    shard.close()
    return directory.path


def dreamfleet(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.parametrize("form", ["npz", "zarr", "minari"])
def test_a_run_goes_out_and_comes_back_as_a_replay(run: Path, tmp_path: Path, form: str) -> None:
    if form == "minari":
        pytest.importorskip("minari", reason="extra datasets")
    out = dreamfleet("replay", "export", run, "--format", form, "--to", tmp_path / "set", "--json")
    report = json.loads(out.stdout)
    assert (report["episodes"], report["rows"]) == (3, 150)
    assert report["skipped"] == {"episode without its end": 10}
    back = dreamfleet("replay", "import", tmp_path / "set", "--to", tmp_path / "r", "--name", "back")
    assert back.exit_code == 0
    assert "imported 3 episodes, 150 rows" in back.stdout
    again = open_replay(tmp_path / "r" / "back")
    assert again.about.name == "synthetic"
    assert again.about.action == ENV.action
    ours = open_replay(run)
    for a, b in zip(ours, again, strict=True):
        assert all(
            np.array_equal(a.columns[key][:-1], b.columns[key][:-1]) for key in (*ENV.obs, "action", "reward")
        )


def test_open_episodes_go_out_when_asked_for(run: Path, tmp_path: Path) -> None:
    out = dreamfleet("replay", "export", run, "--format", "npz", "--to", tmp_path / "n", "--cut-open")
    assert "exported 4 episodes, 160 rows" in out.stdout
    assert "left out" not in out.stdout


def test_a_replay_migrates_by_command(run: Path, tmp_path: Path) -> None:
    source, target = RunDirectory(run).replay, tmp_path / "new"
    out = dreamfleet("replay", "migrate", source, target, "--cast", "vector=float16", "--drop", "direction")
    assert "migrated 4 episodes, 160 rows" in out.stdout
    table, _ = layout.read_table(target)
    assert table.columns["vector"].dtype == "float16"
    assert "direction" not in table.columns


def refused(*words: Any) -> str:
    with pytest.raises(DreamfleetError) as error:
        dreamfleet(*words)
    return str(error.value)


def test_what_cannot_be_is_refused_with_a_remedy(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no dataset" in refused("replay", "import", tmp_path / "empty", "--to", tmp_path)
    assert "is no folder" in refused("replay", "import", tmp_path / "none", "--to", tmp_path)
    assert "is a replay already" in refused("replay", "import", run / "replay", "--to", tmp_path)
    assert "no replay table" in refused(
        "replay", "export", tmp_path / "empty", "--format", "npz", "--to", tmp_path / "x"
    )
    assert "must match" in refused("replay", "import", tmp_path / "empty", "--to", tmp_path, "--name", "a/b")
    for text in ("vector", "vector=word", "=float32"):
        with pytest.raises(ConfigError, match="KEY=DTYPE"):
            parse_casts((text,))


def test_discrete_actions_need_somebody_who_knows_their_number(run: Path) -> None:
    RunDirectory(run).env_file.unlink()
    with pytest.raises(SchemaError, match=r"env_spec\.json"):
        open_replay(run)

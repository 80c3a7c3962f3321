"""A run whose environment shows one key more goes on in its replay, with new weights, when asked to."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from bench.drill import SHORT, dreamfleet
from deploy.audit import audit_run
from deploy.run_config import compose
from deploy.run_dir import RunDirectory
from deploy.session import Session
from replay import layout
from system.errors import ConfigError, SchemaError

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]


def refused(recipe: Path, settings: list[str], kind: type[Exception], *says: str) -> None:
    session = Session(*compose(str(recipe), settings))
    with closing(session), pytest.raises(kind) as error:
        session.start()
    for word in says:
        assert word in str(error.value)


def test_a_run_goes_on_with_an_added_key(tmp_path: Path) -> None:
    recipe = tmp_path / "evolving.yaml"
    blind = SHORT | {"env_steps": 200} | {"env": {"name": "toy:counter", "options": {"image_side": 0}}}
    recipe.write_text(json.dumps({"name": "evolving", "root": str(tmp_path / "runs"), **blind}))
    train = ("train", recipe, "--backend", "local")
    first = dreamfleet(tmp_path, *train)
    assert first.code == 0, first.err
    run = RunDirectory(tmp_path / "runs" / "evolving")
    before = layout.read_history(run.replay)
    seeing = ["env.options.image_side=8", "env_steps=400"]

    refused(recipe, seeing, ConfigError, "another shape", "env.options.image_side")
    asked = [*seeing, "replay.evolve=true"]
    refused(recipe, asked, SchemaError, "image", "--set replay.defaults.image=0")
    said = [*asked, "replay.defaults.image=0"]
    refused(recipe, said, ConfigError, "does not fit", f"move {run.checkpoints} away")
    assert layout.read_history(run.replay) == before
    assert not run.env_spec().obs.keys() & {"image"}
    run.checkpoints.rename(tmp_path / "old weights")

    second = dreamfleet(tmp_path, *train, *(part for item in said for part in ("--set", item)))
    assert second.code == 0, second.err
    history = layout.read_history(run.replay)
    assert [sorted(table.columns.keys() & {"image", "vector"}) for table in history.tables] == [
        ["image", "vector"],
        ["vector"],
    ]
    audit = audit_run(run.path)
    assert audit.balanced, audit.text()
    assert audit.inserted >= 400

"""A run whose environment shows one key more goes on in its replay, with new weights, when asked to."""

import json
from pathlib import Path

import pytest

from bench.drill import SHORT, dreamfleet
from deploy.audit import audit_run
from deploy.run_dir import RunDirectory
from replay import layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_goes_on_with_an_added_key(tmp_path: Path) -> None:
    recipe = tmp_path / "evolving.yaml"
    blind = SHORT | {"env": {"name": "toy:counter", "options": {"image_side": 0}}}
    recipe.write_text(json.dumps({"name": "evolving", "root": str(tmp_path / "runs"), **blind}))
    train = ("train", recipe, "--backend", "local")
    first = dreamfleet(tmp_path, *train)
    assert first.code == 0, first.err
    run = RunDirectory(tmp_path / "runs" / "evolving")
    before = layout.read_history(run.replay)
    seeing = (*train, "--set", "env.options.image_side=8", "--set", "env_steps=800")

    dreamfleet(tmp_path, *seeing).check_refused(2, "another shape", "env.options.image_side")
    asked = (*seeing, "--set", "replay.evolve=true")
    dreamfleet(tmp_path, *asked).check_refused(2, "image", "--set replay.defaults.image=0")
    said = (*asked, "--set", "replay.defaults.image=0")
    dreamfleet(tmp_path, *said).check_refused(2, "does not fit", f"move {run.checkpoints} away")
    assert layout.read_history(run.replay) == before
    assert not run.env_spec().obs.keys() & {"image"}
    run.checkpoints.rename(tmp_path / "old weights")

    second = dreamfleet(tmp_path, *said)
    assert second.code == 0, second.err
    history = layout.read_history(run.replay)
    assert [sorted(table.columns.keys() & {"image", "vector"}) for table in history.tables] == [
        ["image", "vector"],
        ["vector"],
    ]
    audit = audit_run(run.path)
    assert audit.balanced, audit.text()
    assert audit.inserted >= 800

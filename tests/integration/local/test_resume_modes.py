"""A whole run killed and resumed with replay.resume=exact: its books balance without the younger rows."""

import json
from pathlib import Path

import pytest

from bench.drill import SHORT, Drill
from deploy.audit import audit_run
from deploy.run_dir import json_lines
from learner.checkpoint import CheckpointStore
from replay.cut import Cut

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]


RECIPE = SHORT | {"env_steps": 1_000_000, "replay": SHORT["replay"] | {"resume": "exact"}}


def events(run: Drill, name: str) -> list[dict[str, object]]:
    return [e for e in json_lines(run.run_dir.path / "events.jsonl") if e["event"] == name]


def test_a_killed_run_goes_back_to_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    with Drill(tmp_path, RECIPE) as run:
        store = CheckpointStore(run.run_dir.checkpoints, keep=3)
        run.start()
        run.wait_for("a checkpoint after updates", lambda: bool(store.paths()) and run.updates > 20)
        run.kill_everything()
        newest = store.newest_meta()
        assert newest is not None
        name, meta = newest
        cut = Cut.from_json(meta["replay"])
        before = audit_run(run.run_dir.path)

        run.start()
        run.wait_for("the learner's report", lambda: bool(events(run, "replay compared")))
        (done,) = events(run, "replay restored")
        assert (done["checkpoint"], done["rows"]) == (name, cut.rows)
        assert done["removed_rows"] == before.inserted - cut.inserted
        assert events(run, "replay compared")[0]["younger_rows"] == 0
        updates = int(name.split("-")[1])
        run.wait_for("training beyond the checkpoint", lambda: run.updates > updates + 20)
        audit = audit_run(run.run_dir.path)
        assert audit.balanced, audit.text()
        assert audit.inserted > cut.inserted
        status = json.loads(next(run.run_dir.status.glob("learner-0*.json")).read_text())
        assert status["payload"]["younger_rows"] >= 0

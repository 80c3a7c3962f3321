"""A run that goes on while its processes are killed, one kind after the other, and read by a stranger.

All tests share one live run on plain processes, of an environment whose every row is known beforehand.
Each works on any live run, so they may be run alone.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.drill import Drill, environment
from deploy.audit import Audit, audit_run
from deploy.run_dir import json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STRANGER = Path(__file__).with_name("foreign_reader.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with Drill(tmp_path_factory.mktemp("faults")) as drill:
        drill.start()
        drill.wait_for("both sides move", lambda: drill.inserted > 200 and drill.updates > 10)
        yield drill


def audited(run: Drill) -> Audit:
    """The books of the run, which must balance."""
    audit = audit_run(run.run_dir.path)
    assert audit.balanced, audit.text()
    assert (audit.lost, audit.doubled, audit.missing) == (0, 0, 0)
    return audit


def reborn(run: Drill, *keys: str) -> None:
    """Kill roles and wait until each lives again, in a higher incarnation, and rows and updates go on."""
    lives = {key: run.incarnation(key) for key in keys}
    run.wait_for("roles to kill", lambda: all(run.running(key) for key in keys))
    run.kill(*keys)
    run.wait_for(
        f"{keys} in a new life",
        lambda: all(run.running(key) and run.incarnation(key) > lives[key] for key in keys),
    )
    run.wait_for_progress()


def test_stranger_with_only_zarr_finds_the_rows_the_environment_made(run: Drill) -> None:
    seed = json.loads(run.run_dir.config_file.read_text())["seed"]
    found = read_by_a_stranger(run, seed)
    assert "zarr" in found["modules"]
    assert set(found["modules"]).isdisjoint({"replay", "torch", "ray", "learner", "deploy"})
    assert found["rows"] >= 200
    assert found["wrong"] == {"image": 0, "vector": 0, "reward": 0, "flags": 0}
    run.wait_for_progress()  # reading disturbed nobody
    assert read_by_a_stranger(run, seed + 1)["wrong"]["vector"] >= found["rows"]  # the comparison can fail


def read_by_a_stranger(run: Drill, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(STRANGER), str(run.run_dir.replay), str(seed)],
        capture_output=True, text=True, timeout=120, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_killed_actor_comes_back_and_no_acknowledged_row_is_lost_or_doubled(run: Drill) -> None:
    run.wait_for("acknowledged rows", lambda: run.payload("actor-0").get("acknowledged", 0) > 0)
    life = run.incarnation("actor-0")
    reborn(run, "actor-0")
    run.wait_for("rows of the new life", lambda: run.payload("actor-0").get("acknowledged", 0) > 0)
    audit = audited(run)
    old = next(a for a in audit.lives if (a.actor, a.incarnation) == (0, life))
    assert 0 < old.acknowledged <= old.stored
    assert not old.stopped
    assert any(a.actor == 0 and a.incarnation > life and a.stored > 0 for a in audit.lives)
    lost = [e for e in run.run_dir.events() if e["event"] == "role lost" and e["role"] == "actor-0"]
    assert "SIGKILL" in lost[-1]["reason"]


def test_all_actors_killed_at_once_come_back(run: Drill) -> None:
    reborn(run, "actor-0", "actor-1")
    audited(run)


def test_killed_shard_comes_back_on_its_port_with_its_rows(run: Drill) -> None:
    address = run.record("shard-0")["address"]
    before = audited(run).inserted
    reborn(run, "shard-0")
    assert run.record("shard-0")["address"] == address
    assert audited(run).inserted > before


def test_killed_parameter_server_comes_back_and_policies_go_on_getting_newer(run: Drill) -> None:
    reborn(run, "params-0")
    version = run.payload("actor-1")["policy_version"]
    run.wait_for("a newer policy", lambda: run.payload("actor-1").get("policy_version", 0) > version)
    audited(run)


def test_killed_learner_resumes_from_its_checkpoint_in_a_new_epoch(run: Drill) -> None:
    run.wait_for("a checkpoint with updates", lambda: newest_step(run) > 0)
    epoch, at_least = run.payload("learner-0")["epoch"], newest_step(run)
    lives = run.incarnation("learner-0")
    run.kill("learner-0")
    run.wait_for("the learner's next life", lambda: run.incarnation("learner-0") > lives)
    run.wait_for("its first update", lambda: "epoch" in run.payload("learner-0"))
    assert run.updates >= at_least
    assert run.payload("learner-0")["epoch"] > epoch
    run.wait_for_progress()
    audited(run)  # policy versions of no stream ever went back


def newest_step(run: Drill) -> int:
    """Updates in the newest checkpoint, which need not have the most: a learner may have gone back."""
    names = [p.name.split("-") for p in run.run_dir.checkpoints.iterdir() if p.name[0] != "."]
    return max(((int(serial), int(step)) for serial, step in names), default=(0, 0))[1]


def test_learner_and_parameter_server_killed_together_come_back(run: Drill) -> None:
    reborn(run, "learner-0", "params-0")
    audited(run)


def test_shard_and_its_actor_killed_together_come_back(run: Drill) -> None:
    reborn(run, "shard-1", "actor-1")
    audited(run)


def test_everything_killed_resumes_by_the_same_command(run: Drill) -> None:
    run.wait_for("a checkpoint with updates", lambda: newest_step(run) > 0)
    run.wait_for_progress()
    before = audited(run)
    run.kill_everything()
    assert run.processes() == []
    stopped = audit_run(run.run_dir.path)
    assert stopped.balanced, stopped.text()
    saved = newest_step(run)
    ledger = newest_ledger(run)

    run.start()
    run.wait_for("the learner's own word", lambda: "rows_trained" in run.payload("learner-0"))
    assert run.updates >= saved
    run.wait_for_progress()
    after = audited(run)
    assert after.inserted > stopped.inserted >= before.inserted
    assert {(a.actor, a.incarnation) for a in before.lives} < {(a.actor, a.incarnation) for a in after.lives}
    assert "resumed" in {e["event"] for e in run.run_dir.events()}
    steps = [r["env_steps"] for r in json_lines(run.run_dir.metrics / "metrics.jsonl")]
    assert steps == sorted(steps)  # counting went on where it stood
    # The train-ratio ledger goes on: what was owed is trained, what was trained stays trained.
    assert newest_ledger(run)["trained"] >= ledger["trained"] > 0
    run.wait_for("the ratio asked for", lambda: abs(run.payload("learner-0")["train_ratio"] - 4) < 0.4)


def newest_ledger(run: Drill) -> dict[str, float]:
    newest = max(p for p in run.run_dir.checkpoints.iterdir() if p.name[0] != ".")
    return json.loads((newest / "state.json").read_text())["reader"]["limiter"]


def test_killed_supervisor_takes_its_roles_along_and_the_same_command_resumes(run: Drill) -> None:
    before = run.inserted
    run.signal(signal.SIGKILL)
    assert run.wait(10) == -signal.SIGKILL
    run.start()  # at once: the roles of the dead one still hold ports and locks
    run.wait_for("a second life of the run", lambda: run.inserted > before and run.updates > 0)
    run.wait_for_progress()
    audited(run)


def test_stopped_run_leaves_no_process_and_balanced_books(run: Drill) -> None:
    run.signal(signal.SIGTERM)
    assert run.wait() == 75
    assert run.processes() == []
    audit = audited(run)
    assert audit.unsent <= 2 * 2 * 9 * len(audit.lives)  # chunk_rows + 1 per environment and life

"""`dreamfleet export`: a finished run's policy leaves the run and acts as it did inside."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploy.evaluate import load_policy as policy_of_run
from deploy.export_cli import export_run
from learner.export import load_policy
from system.errors import ConfigError, IntegrityError
from system.experience import Step


def steps(env, rows):
    rng = np.random.default_rng(0)
    never = np.zeros(rows, bool)
    for t in range(3):
        yield Step(
            env_id=np.arange(rows, dtype=np.int32),
            obs={
                key: rng.integers(0, 2, size=(rows, *spec.shape)).astype(spec.dtype)
                for key, spec in env.obs.items()
            },
            reward=np.zeros(rows, np.float32),
            is_first=np.full(rows, t == 0),
            is_last=never,
            is_terminal=never,
        )


def test_exported_policy_acts_as_in_its_run(finished: Path, tmp_path: Path, dreamfleet) -> None:
    done = dreamfleet("export", str(finished), "--out", "policy", "--weights-only", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    loaded = load_policy(tmp_path / "policy", threads=0)
    _, env, inside, state = policy_of_run(finished)
    assert said["updates"] == state["progress"]["updates"] == loaded.spec.source["updates"]
    assert set(said["files"]) == {"policy.json", "weights.safetensors"}
    inside.generator.set_state(loaded.policy.generator.get_state())
    ours, theirs = loaded.initial(3), inside.initial(3)
    for step in steps(env, 3):
        expected, theirs, _ = inside.act(theirs, step, "eval")
        np.testing.assert_array_equal(loaded.act(ours, step.obs, step.is_first), expected)


def test_any_checkpoint_of_a_run_can_be_exported_and_a_broken_one_is_refused(
    finished: Path, tmp_path: Path, dreamfleet
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    oldest, *_, newest = sorted((run / "checkpoints").iterdir())
    told = export_run(oldest, tmp_path / "oldest", program=False)
    assert told.checkpoint == oldest.name
    (newest / "arrays.safetensors").write_bytes(b"damaged")
    with pytest.raises(IntegrityError, match="arrays"):
        export_run(newest, tmp_path / "newest", program=False)
    done = dreamfleet("export", str(run), "--out", "sound", "--weights-only", "--json")
    assert json.loads(done.out)["checkpoint"] != newest.name
    assert f"checkpoint skipped path={newest}" in done.err, "whoever gets an older policy is told why"
    assert not (tmp_path / "newest").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, dreamfleet) -> None:
    done = dreamfleet("export", "elsewhere", "--out", "policy")
    done.check_refused(2, "elsewhere is neither a run directory nor a checkpoint")
    with pytest.raises(ConfigError, match="neither a run"):
        export_run(tmp_path / "checkpoints" / "000001-5", tmp_path / "policy")

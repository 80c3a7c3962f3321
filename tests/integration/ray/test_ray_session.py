"""What `dreamfleet train --backend ray` drives, from its start to its summary, and again."""

from pathlib import Path

import pytest

from deploy.ray_session import RaySession
from deploy.run_config import compose
from deploy.run_dir import read_json
from system.errors import ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_run_goes_through_rllib_to_its_summary(
    small: tuple[str, ...], tmp_path: Path, leaves_nothing: None
):
    config, layers = compose("cartpole", [*small, "env_steps=300", f"root={tmp_path}"])
    assert config.backend == "ray"
    session = RaySession(config, layers, resume="never")
    try:
        session.start()
        assert not session.resumed
        while not session.finished:
            progress = session.step()
            assert progress.env_steps_asked == 300
        summary = session.finish()
    finally:
        session.close()
    assert summary.env_steps >= 300
    assert summary.updates > 0
    assert summary.evaluation_episodes == 4
    assert read_json(session.run_dir.summary_file)["updates"] == summary.updates
    again = RaySession(config, layers, resume="never")
    with pytest.raises(ConfigError, match="already holds a run"):
        again.start()
    again.close()


def test_a_bad_environment_is_refused_before_anything_starts(small: tuple[str, ...], tmp_path: Path):
    config, layers = compose("cartpole", [*small, "env.name=envpool:CartPoel-v1", f"root={tmp_path}"])
    session = RaySession(config, layers)
    with pytest.raises(ConfigError, match="CartPole"):
        session.start()
    session.close()
    assert not list(tmp_path.iterdir())

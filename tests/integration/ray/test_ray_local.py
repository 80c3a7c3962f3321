"""A local Ray whose start fails: said so, and nothing of it is left."""

import gc
import tempfile
from pathlib import Path

import pytest

from deploy.ray_local import LocalRay, prepare_ray
from system.errors import InfrastructureError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_start_that_fails_is_tried_again_and_leaves_nothing(
    leaves_nothing: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    prepare_ray()
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "0")  # no server is up at once
    made: list[str] = []
    make = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **how: made.append(make(**how)) or made[-1])
    with pytest.raises(InfrastructureError, match="did not start"):
        LocalRay()
    assert [r.message for r in caplog.records].count("local Ray did not start, trying again") == 2
    gc.collect()  # a child that nobody waited for is a warning here, and warnings fail a test
    assert len(made) >= 3
    assert not any(Path(one).exists() for one in made)

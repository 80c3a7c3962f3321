"""Videos of frames as environments stack them; curves of a world model."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from deploy.pictures import _write_video, plot_world_model
from learner.evaluation.harness import evaluate_model
from learner.evaluation.oracle import OracleModel, simulated_rows
from learner.evaluation.simulators import CartPole


@pytest.mark.parametrize(("channels", "shown"), [(1, [0]), (3, [0, 1, 2]), (4, [3]), (12, [9, 10, 11])])
def test_video_shows_the_newest_frame_of_a_stack(tmp_path: Path, channels: int, shown: list[int]) -> None:
    levels = np.arange(channels, dtype=np.uint8) * 20
    frames = np.broadcast_to(levels, (2, 32, 32, channels))  # [T, H, W, C]
    gif, mp4 = _write_video(tmp_path / "x", frames)
    pixel = iio.imread(gif, mode="RGB")[0, 0, 0].tolist()
    assert pixel == (20 * np.array(shown)).repeat(3 // len(shown)).tolist()
    assert mp4.stat().st_size > 0


@pytest.mark.parametrize("seen", [2, 9])  # 9: one predicted row
def test_curves_of_a_world_model_are_drawn(tmp_path: Path, seen: int) -> None:
    rows = simulated_rows(CartPole(), sequences=4, time=10, seen=seen, seed=0)
    report = evaluate_model(OracleModel(CartPole()), rows, seed=0)
    picture = iio.imread(plot_world_model(tmp_path / "x.png", report))
    assert picture.shape[1] > 1.5 * picture.shape[0]  # two lines of three panels
    assert picture[..., :3].std() > 5

"""Videos of frames as environments stack them."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from deploy.pictures import _write_video


@pytest.mark.parametrize(("channels", "shown"), [(1, [0]), (3, [0, 1, 2]), (4, [3]), (12, [9, 10, 11])])
def test_video_shows_the_newest_frame_of_a_stack(tmp_path: Path, channels: int, shown: list[int]) -> None:
    levels = np.arange(channels, dtype=np.uint8) * 20
    frames = np.broadcast_to(levels, (2, 32, 32, channels))  # [T, H, W, C]
    gif, mp4 = _write_video(tmp_path / "x", frames)
    pixel = iio.imread(gif, mode="RGB")[0, 0, 0].tolist()
    assert pixel == (20 * np.array(shown)).repeat(3 // len(shown)).tolist()
    assert mp4.stat().st_size > 0

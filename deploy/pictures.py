"""The pictures a run ends with: the learning curve (PNG) and an open-loop prediction (GIF and MP4 for
images, PNG for vectors). Reads only the run directory, so they can be redrawn at any time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import assemble
from deploy.evaluate import load_agent
from deploy.run_dir import read_json
from system.errors import ConfigError
from system.metrics import Metrics

CONTEXT_ROWS = 5


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw_curve(path: Path) -> Path:
    """Training return over environment steps, with the final evaluation and the random baseline."""
    source = path / "metrics" / "episodes.jsonl"
    lines = source.read_text().splitlines() if source.exists() else []
    points = [json.loads(line) for line in lines]
    figure, axes = _axes()
    if points:
        x = np.array([p["env_steps"] for p in points])
        y = np.array([p["return"] for p in points])
        axes.plot(x, y, ".", alpha=0.25, label="episode")
        width = min(20, len(y))
        axes.plot(x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), label=f"mean of {width}")
    summary = path / "summary.json"
    if summary.exists():
        done = read_json(summary)
        axes.axhline(done["evaluation_return"], ls="--", lw=1, label="final evaluation")
        axes.axhline(done["random_return"], ls=":", lw=1, color="gray", label="random")
    axes.set(xlabel="environment steps", ylabel="training return", title=path.name)
    axes.legend(loc="best", fontsize=8)
    figure.savefig(target := path / "curve.png", dpi=120)
    return target


def draw_open_loop(path: Path) -> list[Path]:
    """Truth, prediction and error of one replayed stretch; the model sees its first rows only.

    Returns the files written. Raises: ConfigError when the replay is empty.
    """
    from learner.evaluation.openloop import open_loop

    config, env_spec, agent, _state = load_agent(path)
    reader = assemble.replay_reader(config, env_spec, str(path), (), Metrics(config.name, "video"))
    try:
        if reader.counts().live < config.learner.length + config.learner.context:
            raise ConfigError(f"{path} has no replay to predict from; keep its replay/ directory")
        sequence = reader.draw()
        result = open_loop(agent, sequence, context=CONTEXT_ROWS)
    finally:
        reader.close()
    files: list[Path] = []
    for key, video in result.videos.items():
        files += _write_video(path / f"openloop-{key}", video)
    if result.vectors:
        files.append(_plot_vectors(path / "openloop.png", result.vectors))
    return files


def _write_video(stem: Path, frames: NDArray[np.uint8]) -> list[Path]:
    """Frames [T, H, W, 3]: written as GIF and MP4, magnified to be seen."""
    import imageio.v3 as iio

    scale = max(1, 192 // frames.shape[2]) if frames.shape[2] < 192 else 1
    big = frames.repeat(scale, 1).repeat(scale, 2)
    big = big[:, : big.shape[1] // 2 * 2, : big.shape[2] // 2 * 2]  # H.264 wants even sides
    gif, mp4 = stem.with_suffix(".gif"), stem.with_suffix(".mp4")
    iio.imwrite(gif, big, duration=100, loop=0)
    iio.imwrite(mp4, big, fps=10, macro_block_size=2)
    return [gif, mp4]


def _plot_vectors(target: Path, vectors: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Path:
    """vectors: key -> (truth [T, D], model [T, D]) of one sequence."""
    figure, axes = _axes()
    for key, (truth, model) in vectors.items():
        for d in range(min(4, truth.shape[1])):
            (line,) = axes.plot(truth[:, d], lw=1.5, label=f"{key}[{d}]")
            axes.plot(model[:, d], ls="--", lw=1, color=line.get_color())
    axes.axvline(CONTEXT_ROWS - 1, color="gray", lw=1)
    axes.set(xlabel="step", title="open loop: truth (solid), model (dashed); context left of the line")
    axes.legend(fontsize=7)
    figure.savefig(target, dpi=120)
    return target

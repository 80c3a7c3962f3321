"""The pictures a run ends with: the learning curve (PNG) and an open-loop prediction (GIF and MP4 for
images, error over the horizon for all). Reads only the run directory, so they can be redrawn at any time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploy import assemble
from deploy.evaluate import load_agent
from deploy.run_dir import RunDirectory, json_lines, read_json
from system.errors import ConfigError, DeadlineError
from system.metrics import Metrics

if TYPE_CHECKING:
    from learner.evaluation.harness import WorldModelReport
    from learner.evaluation.openloop import OpenLoop

CONTEXT_ROWS = 5
PANELS = 3
"""Curves beside each other."""


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw_curve(path: Path) -> Path:
    """Training return over environment steps, with the final evaluation and the random baseline."""
    RunDirectory(path).config()  # refuses what is no run
    points = list(json_lines(path / "metrics" / "episodes.jsonl"))
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
    """Truth, prediction and error of replayed stretches; the model sees their first rows only.

    Returns the files written: a GIF and an MP4 per image key, and the error over the horizon as PNG.
    Raises: ConfigError when the replay holds no whole sequence.
    """
    from learner.evaluation.openloop import film_strip, open_loop
    from replay.offline import OfflineLedger

    config, env_spec, agent, _state = load_agent(path)
    metrics = Metrics(config.name, "video")
    reader = assemble.replay_reader(config, env_spec, str(path), (), metrics, limiter=OfflineLedger())
    try:
        sequence = reader.sample(timeout=5.0)
        report = open_loop(
            agent, sequence, context=min(CONTEXT_ROWS, config.learner.length - 1), seed=config.seed
        )
    except DeadlineError as error:
        raise ConfigError(
            f"{path} has no replay to predict from ({error}); keep its replay/ directory"
        ) from error
    finally:
        reader.close()
    files: list[Path] = []
    for key, images in report.images.items():
        files += _write_video(path / f"openloop-{key}", film_strip(images))
    return [*files, _plot_errors(path / "openloop.png", report)]


def _write_video(stem: Path, frames: NDArray[np.uint8]) -> list[Path]:
    """Frames [T, H, W, C]: written as GIF and MP4, magnified to be seen; of a frame stack, the newest one."""
    import imageio.v3 as iio

    depth = 1 if frames.shape[-1] % 3 else 3
    frames = frames[..., -depth:].repeat(3 // depth, -1)
    scale = max(1, 384 // frames.shape[1])
    big = frames.repeat(scale, 1).repeat(scale, 2)
    big = big[:, : big.shape[1] // 2 * 2, : big.shape[2] // 2 * 2]  # H.264 wants even sides
    gif, mp4 = stem.with_suffix(".gif"), stem.with_suffix(".mp4")
    iio.imwrite(gif, big, duration=100, loop=0)
    iio.imwrite(mp4, big, fps=10, macro_block_size=2)
    return [gif, mp4]


def _plot_errors(target: Path, report: OpenLoop) -> Path:
    """Error of model and of copying the last seen row, per key, over the predicted steps [H]."""
    figure, axes = _axes()
    inside = report.valid > 0
    horizon = np.arange(1, len(report.valid) + 1)[inside]
    for key, error in report.error.items():
        (line,) = axes.plot(horizon, error[inside], lw=1.5, label=key)
        axes.plot(horizon, report.copy_error[key][inside], ls=":", lw=1, color=line.get_color())
    axes.set(
        xlabel="predicted step", ylabel="mean absolute error", yscale="log",
        title=f"open loop after {report.context} rows: model (solid), copy of the last row (dotted)",
    )  # fmt: skip
    axes.legend(fontsize=7)
    figure.savefig(target, dpi=120)
    return target


def plot_world_model(target: Path, report: WorldModelReport) -> Path:
    """Errors over predicted steps, a panel per group of channels: model, one step, and the baselines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = dict(report.curves)
    if sum(name.startswith("obs/") and name.count("/") == 1 for name in curves) == 1:
        curves.pop("obs", None)  # the same curve again
    lines = -(-len(curves) // PANELS)
    figure = Figure(figsize=(4.0 * PANELS, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, PANELS, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, curve) in zip(panels, curves.items(), strict=False):
        steps = np.arange(1, curve.counted + 1)
        for values, label, style in (
            (curve.model, "model, open loop", "-"),
            (curve.one_step, "model, one step", "-."),
            (curve.copy, "copy of the last seen row", ":"),
            (curve.mean, "mean of the data", "--"),
        ):
            axes.plot(steps, values[: curve.counted], style, lw=1.2, label=label)
        if 0 < curve.useful_horizon < curve.counted:
            axes.axvline(curve.useful_horizon, color="gray", lw=0.8)
        axes.set(title=f"{name}: useful horizon {curve.useful_horizon}", xlabel="predicted step")
    panels[0].set_ylabel("error in standard deviations")
    panels[0].legend(fontsize=7)
    figure.savefig(target, dpi=120)
    return target

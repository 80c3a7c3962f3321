"""One training run from adopting its directory to its summary: what `dreamfleet train` and the RLlib
`Algorithm` both drive. Holds the driver, the fleet, the metric files; decides resume.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.driver import Driver, Progress
from deploy.fleet import Fleet
from deploy.health import alarm_histories
from deploy.plan import check_settings
from deploy.probe import probe_env
from deploy.progress import MetricFiles
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory, append_text, json_lines, write_atomic
from system.config import Layers, dump_with_origin, flatten
from system.errors import ConfigError, PreflightError
from system.metrics import Metrics
from system.specs import EnvSpec

if TYPE_CHECKING:
    from deploy.evaluate import Summary

log = logging.getLogger(__name__)
SHAPE_KEYS = ("env.name", "env.options", "learner.family", "learner.settings", "replay.shards", "seed")
"""Settings that shape what is on disk; a resumed run must keep them."""
LEAST_FREE_BYTES = 64 << 20


def make_fleet(config: RunConfig, run_dir: Path) -> Fleet:
    """The backend the run asks for. Raises: ConfigError when Ray is asked for and absent."""
    if config.backend == "local":
        from deploy.local import LocalFleet

        return LocalFleet(run_dir)
    try:
        from deploy.ray_fleet import RayFleet
    except ImportError as error:
        raise ConfigError(
            f"backend ray needs the ray package ({error}); pip install 'ray[rllib,default]' or use "
            "--backend local"
        ) from error
    return RayFleet(run_dir)


def check_port(setting: str, host: str, port: int) -> None:
    """Raises: PreflightError when nobody could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PreflightError(
                f"{setting} ({port}) cannot be used on {host} ({error.strerror}); "
                "choose a free port, or 0 for any"
            ) from error


class Session:
    """start(), step() until `finished`, finish(); close() in every case."""

    def __init__(
        self,
        config: RunConfig,
        layers: Layers,
        *,
        resume: str = "auto",
        fleet_factory: Callable[[RunConfig, Path], Fleet] = make_fleet,
    ) -> None:
        self.config, self._layers, self._resume = config, layers, resume
        self._fleet_factory = fleet_factory
        self.run_dir = RunDirectory(config.directory)
        self.driver: Driver | None = None
        self._fleet: Fleet | None = None
        self._files: MetricFiles | None = None
        self.metrics = Metrics(config.name, "driver")
        self.resumed = False
        self.changes: list[str] = []

    def start(self) -> None:
        """Check everything that can be checked, then launch.

        Raises: ConfigError, PreflightError, EnvError; nothing is launched then.
        """
        self._check_resume()
        env_spec = self._env_spec()
        check_settings(self.config, env_spec)
        self._check_machine()
        self.run_dir.create()
        self.run_dir.write_json(self.run_dir.config_file, self.config.model_dump(mode="json"))
        write_atomic(self.run_dir.path / "run.yaml", dump_with_origin(self.config, self._layers))
        self.run_dir.write_json(self.run_dir.env_file, env_spec.to_json())
        self.run_dir.event("resumed" if self.resumed else "created", changes=self.changes)
        self._fleet = self._fleet_factory(self.config, self.run_dir.path)
        self.driver = Driver(self.config, env_spec, self._fleet, self.run_dir)
        if self.resumed:
            from deploy.resume import prepare_replay

            prepare_replay(self.config, env_spec, self.run_dir)  # now that nothing old runs any more
            self._recall(self.driver)
        self._files = MetricFiles(self.run_dir.metrics)
        self.driver.metrics_port = self.metrics.serve(
            self.config.services.metrics_port, self.config.services.host
        )
        self.driver.start()

    def _recall(self, driver: Driver) -> None:
        """Counts go on where they stood: the learner needs seconds to say its own, actors begin at none."""
        for record in json_lines(self.run_dir.metrics / "metrics.jsonl"):
            driver.progress.updates = int(record.get("learner/updates", driver.progress.updates))
            driver.episodes = int(record.get("env/episodes", driver.episodes))

    def _check_resume(self) -> None:
        if not self.run_dir.exists or not self.run_dir.holds_work:
            if self._resume == "require":
                raise ConfigError(
                    f"--resume require: there is no run at {self.run_dir.path}; check name and root"
                )
            return
        if self._resume == "never":
            raise ConfigError(
                f"--resume never: {self.run_dir.path} already holds a run; use another --set "
                "name=NEW or remove it"
            )
        old, new = flatten(self.run_dir.config()), flatten(self.config)
        differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        may_differ = ("env.options",) if self.config.replay.evolve else ()
        shape = [k for k in differing if k.startswith(SHAPE_KEYS) and not k.startswith(may_differ)]
        if shape:
            listed = "\n".join(f"  {k}: {old.get(k)!r} on disk, {new.get(k)!r} asked" for k in shape)
            raise ConfigError(
                f"{self.run_dir.path} holds a run of another shape:\n{listed}\n"
                "keep these settings to resume it, or start a new one with --set name=NEW"
            )
        self.changes = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing]
        self.resumed = True

    def _env_spec(self) -> EnvSpec:
        """As the run began; looked at again when its replay may evolve, or to begin.

        Raises: ConfigError, SchemaError when weights or replay of the run do not fit what the environment
        shows now.
        """
        if self.resumed and self.run_dir.env_file.is_file() and not self.config.replay.evolve:
            return self.run_dir.env_spec()
        env_spec = probe_env(self.config.env.name, self.config.env.options)
        if self.resumed and self.config.replay.evolve:
            from deploy.resume import check_evolution

            check_evolution(self.config, env_spec, self.run_dir)
        return env_spec

    def _check_machine(self) -> None:
        """Raises: PreflightError when the disk is full or a port taken."""
        place = next(p for p in (self.run_dir.path, *self.run_dir.path.parents) if p.exists())
        free = shutil.disk_usage(place).free
        if free < LEAST_FREE_BYTES:
            raise PreflightError(
                f"only {free >> 20} MiB free at {place}, at least {LEAST_FREE_BYTES >> 20} MiB are needed; "
                "free space or choose another place with --set root=DIR"
            )
        services = self.config.services
        # A resumed run's own roles may hold the port until the backend has ended them.
        if services.params_port and self.config.backend == "local" and not self.resumed:
            check_port("services.params_port", services.host, services.params_port)
        if services.metrics_port:
            check_port("services.metrics_port", services.host, services.metrics_port)

    def step(self, seconds: float = 1.0) -> Progress:
        assert self.driver is not None
        assert self._files is not None
        progress = self.driver.step(seconds)
        self._files.write(progress)
        self._keep_curve()
        self._export(progress)
        return progress

    def _export(self, progress: Progress) -> None:
        self.metrics["driver_env_steps"].set(progress.env_steps)
        self.metrics.labels("driver_actors", state="running").set(progress.actors)
        self.metrics.labels("driver_actors", state="away").set(self.config.actors.count - progress.actors)
        assert self.driver is not None
        for role, count in self.driver.take_restarts().items():
            self.metrics.labels("driver_restarts_total", restarted=role).inc(count)

    @property
    def finished(self) -> bool:
        assert self.driver is not None
        return self.driver.finished

    def finish(self) -> Summary:
        """Stop all roles, then evaluate the final policy and draw the pictures."""
        from deploy.evaluate import Summary, evaluate_run
        from deploy.pictures import draw_curve, draw_open_loop

        assert self.driver is not None
        assert self._files is not None
        self.halt()
        progress = self.driver.progress
        report = evaluate_run(self.run_dir.path, self.config.evaluation.episodes)
        self._files.write(progress, force=True)
        self.metrics["driver_eval_return"].set(report.mean)
        self._files.scalar("eval/return_mean", report.mean, progress.env_steps)
        summary = Summary(
            run_dir=str(self.run_dir.path),
            env_steps=progress.env_steps,
            updates=progress.updates,
            seconds=progress.seconds,
            evaluation_return=report.mean,
            evaluation_std=report.std,
            evaluation_episodes=len(report.returns),
            random_return=report.random_mean,
            finished_at=time.time(),
            curve="",
            alarms=[history.to_dict() for history in alarm_histories(self.run_dir)],
        )
        self.run_dir.write_json(self.run_dir.summary_file, summary.to_dict())
        curve = str(draw_curve(self.run_dir.path))  # shows what the summary says
        summary = replace(summary, curve=curve, video=[str(p) for p in draw_open_loop(self.run_dir.path)])
        self.run_dir.write_json(self.run_dir.summary_file, summary.to_dict())
        return summary

    def halt(self) -> None:
        """Stop all roles with a final checkpoint; the run can be resumed."""
        if self.driver is not None:
            self.driver.stop()
            self._keep_curve()

    def _keep_curve(self) -> None:
        """Move the driver's new episodes into a file: a killed run keeps its learning curve."""
        assert self.driver is not None
        points, self.driver.curve = self.driver.curve, []
        if points:
            lines = "".join(json.dumps(point) + "\n" for point in points)
            append_text(self.run_dir.metrics / "episodes.jsonl", lines)

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None
        if self._files is not None:
            self._files.close()
            self._files = None
        self.metrics.close()
        self.run_dir.release()

    def status(self) -> dict[str, Any]:
        assert self._fleet is not None
        return {key: status.state for key, status in self._fleet.statuses().items()}

"""Dreamfleet as an RLlib `Algorithm`: the control plane of a run, for `algo.train()`, Tune and checkpoints.

No experience passes here (docs/decisions/0006): `step` advances a `deploy.session.Session` by about a second
and reports its counters. What of RLlib 2.60 this leans on, in one place because it drifts:

- `Algorithm.__init__` turns dicts into our config (`get_default_config`, `update_from_dict`, `from_state`),
  calls `config.validate()` and `freeze()`, and leaves environments alone while `config.env` is None.
- `setup` replaces RLlib's: no EnvRunnerGroup, LearnerGroup or connectors. It keeps `self.callbacks` and
  `_set_up_metrics()`, which RLlib's `log_result`, `save_checkpoint` and `load_checkpoint` use.
- `step` replaces RLlib's, as its docstring invites; `Trainable.train` adds training_iteration and times.
- `Checkpointable.save_to_path` writes rllib_checkpoint.json, class_and_ctor_args.pkl and algorithm_state.pkl,
  which `Algorithm.from_checkpoint` wants. The two are RLlib's own pickles and hold a class name and plain
  settings; `Dreamfleet.from_checkpoint` reads JSON and safetensors only.
- `save_checkpoint` and `load_checkpoint` delegate to `save_to_path` and `restore_from_path`.
- `default_resource_request`: a trial's process books all of the first bundle: the learner's share.
- `Trainable._storage` (where a trial's files live), `_logdir` (RLlib makes one per algorithm), `_iteration`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow.fs
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils import force_list
from ray.rllib.utils.checkpoints import Checkpointable
from ray.tune import Checkpoint, PlacementGroupFactory

from deploy import algorithm_checkpoint
from deploy.driver import Progress
from deploy.ray_fleet import role_resources
from deploy.run_config import RunConfig, compose
from deploy.run_dir import RunDirectory
from deploy.session import Session
from learner.checkpoint import CheckpointStore
from system.config import Layers
from system.errors import ConfigError, InfrastructureError

if TYPE_CHECKING:
    from deploy.evaluate import Summary

CHECKPOINT_SECONDS = 120.0
"""Longest wait for a checkpoint asked of a running learner."""
POLL_SECONDS = 0.05
OWN_KEYS = frozenset({"recipe", "assignments", "settings", "origin", "step_seconds"})


@functools.cache
def _rllib_keys() -> frozenset[str]:
    return frozenset(AlgorithmConfig().to_dict())


class DreamfleetConfig(AlgorithmConfig):
    """Settings of a run in RLlib's clothes: a recipe and overrides, validated like the command line's."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or Dreamfleet)
        self.recipe = ""
        self.assignments: list[str] = []
        self.settings: dict[str, Any] = {}  # nested, over the recipe; or all of them when there is no recipe
        self.origin: dict[str, str] = {}
        self.step_seconds = 1.0

    def run(
        self,
        *,
        recipe: str,
        assignments: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        step_seconds: float = 1.0,
    ) -> Self:
        """Choose what is run. Raises: ConfigError at once for anything the command line would refuse.

        `assignments`: "actors.count=4" as after --set. `settings`: the same, nested or dotted, as values.
        `step_seconds`: how long one train() lasts, about.
        """
        self.recipe, self.assignments, self.step_seconds = recipe, list(assignments), step_seconds
        self.settings, self.origin = {}, {}
        for key, value in (settings or {}).items():
            self._lay(key, value)
        self.resolve()
        return self

    def resolved(self, config: RunConfig, origin: Mapping[str, str]) -> Self:
        """Take a run that is already composed."""
        self.recipe, self.assignments = "", []
        self.settings, self.origin = config.model_dump(mode="json"), dict(origin)
        return self

    def _lay(self, key: str, value: Any) -> None:
        for part in reversed(key.split(".")):
            value = {part: value}
        self.settings = Layers(self.settings).add(value, "settings").values

    def resolve(self) -> tuple[RunConfig, Layers]:
        """The validated run and where each value came from. Raises: ConfigError."""
        if self.recipe:
            return compose(self.recipe, self.assignments, {**self.settings, "backend": "ray"})
        if not self.settings:
            raise ConfigError("no recipe chosen; use DreamfleetConfig().run(recipe='cartpole')")
        config = RunConfig.model_validate({**self.settings, "backend": "ray"})
        return config, Layers(config.model_dump(mode="json"), dict(self.origin))

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> Self:
        """As RLlib's, for Tune's param_space: keys of `run`, settings (dotted or nested), RLlib's own keys.

        Raises: ConfigError for a key that is neither; RLlib would take it in silence.
        """
        theirs: dict[str, Any] = {}
        for key in OWN_KEYS & config_dict.keys():
            setattr(self, key, copy.deepcopy(config_dict[key]))
        for key in config_dict.keys() - OWN_KEYS:
            value = config_dict[key]
            if key in ("env", "seed") and (value is None or isinstance(value, str)):  # RLlib has these too
                if value is not None:
                    self._lay("env.name", value)
            elif key.split(".")[0] in RunConfig.model_fields:
                self._lay(key, value)
            elif key.startswith("__") or key in _rllib_keys():
                theirs[key] = value
            else:
                known = ", ".join(sorted(OWN_KEYS | RunConfig.model_fields.keys()))
                raise ConfigError(f"unknown key {key!r} in the algorithm's settings; known: {known}")
        return super().update_from_dict(theirs)

    def validate(self) -> None:
        """Ours replaces RLlib's: nothing it checks is used."""
        self.resolve()


class Dreamfleet(Algorithm):
    """A run as an RLlib algorithm. Roles start with the first train() or with start()."""

    config: DreamfleetConfig  # pyright: ignore[reportIncompatibleVariableOverride] (RLlib types it wider)
    session: Session

    @classmethod
    def get_default_config(cls) -> DreamfleetConfig:
        return DreamfleetConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """One bundle for the driver with the learner's share, one for each actor."""
        if not isinstance(config, DreamfleetConfig):
            config = cls.get_default_config().update_from_dict(config)
        run, _ = config.resolve()
        values = run.model_dump(mode="json")
        gpus = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
        rank = role_resources("learner", values, gpus)
        learner = {k: v * run.learner.ranks for k, v in rank.items() if v}
        actors = [role_resources("actor", values, gpus) for _ in range(run.actors.count)]
        return PlacementGroupFactory([learner, *actors])

    def setup(self, config: Any) -> None:
        """Decide what runs where; nothing is launched or written yet."""
        self.callbacks = [cls() for cls in force_list(self.config.callbacks_class)]
        self._set_up_metrics()
        run, layers = self.config.resolve()
        trial = self._trial_directory()
        if trial is None:
            place: dict[str, Any] = {"root": run.root.absolute()}
            with contextlib.suppress(OSError):
                Path(str(self.logdir)).rmdir()  # RLlib's, empty; the run has its own
            self._logdir = str(place["root"] / run.name)
        else:
            place = {"root": trial, "name": "run"}
            layers.origin.update(dict.fromkeys(place, "Tune trial"))
        self.run_config, self._layers = run.model_copy(update=place), layers
        self.run_dir = RunDirectory(self.run_config.directory)
        self._restored_from: Path | None = None
        self._started = self._running = False

    def _trial_directory(self) -> Path | None:
        """Where Tune keeps this trial's files; it stays the same when the trial is restarted."""
        if self._storage is None:
            return None
        if isinstance(self._storage.storage_filesystem, pyarrow.fs.LocalFileSystem):
            return Path(self._storage.trial_fs_path)
        return Path(self._storage.trial_working_directory)  # remote storage: the run itself stays local

    # -- training ---------------------------------------------------------------------------------

    def start(self, resume: str = "auto") -> None:
        """Launch the roles; train() does it when nobody has.

        Raises: ConfigError, PreflightError, EnvError before anything is launched; InfrastructureError.
        """
        if self._started:
            return
        if self._restored_from is not None and not self._adopt():
            raise ConfigError(
                f"run {self.run_dir.path} is driven by another process; stop that one to go on here, or "
                "restore into another run: from_checkpoint(path, config=...) with another name"
            )
        self.session = Session(self.run_config, self._layers, resume=resume)
        try:
            self.session.start()
        except BaseException:
            self.session.close()
            raise
        self._started = self._running = True

    def step(self) -> dict[str, Any]:
        self.start()
        progress = self.session.step(self.config.step_seconds)
        result = _result(progress) | {"done": self.session.finished}
        every = self.config.evaluation_interval
        if every and (self.iteration + 1) % int(every) == 0:
            result["evaluation"] = self.evaluate()
        return result

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Play the run's evaluation episodes with the newest policy, greedily, and as many with a random one.

        Raises: ConfigError before anything was trained or restored.
        """
        from deploy.evaluate import evaluate_run

        place = self.run_dir.path
        if self._running:
            self._checkpoint_now()
        if self._restored_from is not None:
            place = self._restored_from / "run"
        report = evaluate_run(place, self.run_config.evaluation.episodes)
        return {
            "env_runners": {
                "episode_return_mean": report.mean,
                "episode_return_min": min(report.returns),
                "episode_return_max": max(report.returns),
                "episode_len_mean": sum(report.lengths) / len(report.lengths),
                "num_episodes": len(report.returns),
                "hist_stats": {"episode_reward": report.returns, "episode_lengths": report.lengths},
            },
            "episode_return_std": report.std,
            "random_return_mean": report.random_mean,
            "env_steps": report.env_steps,
            "updates": report.updates,
        }

    def finish(self) -> Summary:
        """Stop all roles, evaluate the final policy, draw the pictures."""
        self._running = False
        return self.session.finish()

    def halt(self) -> None:
        """Stop all roles, the learner with a last checkpoint."""
        if self._running:
            self._running = False
            self.session.halt()

    def abandon(self) -> None:
        """End all roles at once; what the newest checkpoint holds stays."""
        self._running = False
        if self._started:
            self._started = False
            self.session.close()

    def cleanup(self) -> None:
        """RLlib's hook of stop(): halt, then end the local Ray when this run started it."""
        try:
            self.halt()
        finally:
            self.abandon()

    # -- checkpoints ------------------------------------------------------------------------------

    def _checkpoint_now(self) -> None:
        """Let the running learner save; what is on disk then is at most one update old.

        Raises: InfrastructureError when it does not within CHECKPOINT_SECONDS.
        """
        store = CheckpointStore(self.run_dir.checkpoints, keep=1)
        before = store.paths()[-1:]
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        self.run_dir.checkpoint_request.touch()
        while store.paths()[-1:] == before:
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the learner saved no checkpoint within {CHECKPOINT_SECONDS:.0f} s; "
                    f"see {self.run_dir.logs}"
                )
            time.sleep(POLL_SECONDS)

    def save_to_path(self, path: Any = None, **_: Any) -> str:
        """Save the policy and what restoring needs; see `algorithm_checkpoint`. Local paths only.

        Raises: ConfigError, PreflightError, InfrastructureError.
        """
        if self._running:
            self._checkpoint_now()
        elif self._restored_from is not None and not self._adopt():
            raise ConfigError(f"run {self.run_dir.path} is driven by another process; save from that one")
        written = Checkpointable.save_to_path(
            self, path, state={"training_iteration": self.training_iteration}
        )
        saved = algorithm_checkpoint.Saved(
            format=algorithm_checkpoint.FORMAT,
            source=str(self.run_dir.path),
            training_iteration=self.training_iteration,
            settings=self.run_config.model_dump(mode="json"),
            origin=self._layers.origin,
        )
        algorithm_checkpoint.save(Path(written), self.run_dir, saved)
        return written

    def restore_from_path(self, path: Any, **_: Any) -> None:
        """Make the saved policy this run's newest; training goes on from it, evaluate() plays it.

        Raises: ConfigError, IntegrityError.
        """
        self.cleanup()
        self._restored_from = Path(path).absolute()
        self._iteration = algorithm_checkpoint.load_index(self._restored_from).training_iteration
        if self.run_dir.path.parent.is_dir():  # a moved checkpoint may only be evaluated
            self._adopt()

    def _adopt(self) -> bool:
        assert self._restored_from is not None
        if algorithm_checkpoint.adopt(self._restored_from, self.run_dir, self.run_config):
            self._restored_from = None
            return True
        return False

    @classmethod
    def from_checkpoint(
        cls, path: Any, filesystem: Any = None, *, config: DreamfleetConfig | None = None, **_: Any
    ) -> Dreamfleet:
        """Rebuild what `save_to_path` wrote, reading JSON and safetensors only.

        `config`: other settings, e.g. more env_steps or another name; the model must stay the same.
        Raises: ConfigError, IntegrityError.
        """
        place = Path(path.to_directory() if isinstance(path, Checkpoint) else path)
        saved = algorithm_checkpoint.load_index(place)
        chosen = config or DreamfleetConfig().resolved(RunConfig.model_validate(saved.settings), saved.origin)
        algo = cls(config=chosen)
        algo.restore_from_path(place)
        return algo

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What Algorithm.from_checkpoint calls our constructor with: plain values."""
        values = {"settings": self.run_config.model_dump(mode="json"), "origin": dict(self._layers.origin)}
        return (values,), {}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        return []

    def __repr__(self) -> str:
        return f"Dreamfleet({self.run_config.env.name}, {self.run_dir.path})"


def _result(progress: Progress) -> dict[str, Any]:
    """RLlib's names where it has one, ours beside them."""
    mean = float("nan") if progress.return_mean is None else progress.return_mean
    return {
        "env_runners": {
            "episode_return_mean": mean,
            "num_episodes_lifetime": progress.episodes,
            "num_env_steps_sampled_lifetime": progress.env_steps,
            "num_env_steps_sampled_per_second": progress.env_rate,
            "num_healthy_workers": progress.actors,
        },
        "learners": {"num_updates_lifetime": progress.updates, **progress.learner},
        "num_env_steps_sampled_lifetime": progress.env_steps,
        "env_steps": progress.env_steps,
        "updates": progress.updates,
        "train_ratio": progress.train_ratio,
        "train_ratio_asked": progress.train_ratio_asked,
        "policy_version": progress.policy_version,
        "policy_lag": progress.policy_lag,
        "restarts": progress.restarts,
    }

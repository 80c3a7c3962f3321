"""The command `dreamfleet export`: takes the policy out of a run, for `learner.export` to write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.run_dir import RunDirectory
from system.errors import ConfigError

if TYPE_CHECKING:
    from learner.checkpoint import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written where."""

    folder: str
    checkpoint: str
    updates: int
    env_steps: int
    files: dict[str, int]  # bytes by name

    def text(self) -> str:
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.files.items())
        return (
            f"{self.folder}: policy of {self.checkpoint} after {self.updates} updates and "
            f"{self.env_steps} environment steps ({sizes})"
        )


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new folder.")
@click.option("--weights-only", is_flag=True, help="Write no torch.export program.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def export(source: Path, out: Path, weights_only: bool, as_json: bool) -> None:
    """Write the policy of a run, or of one of its checkpoints, to a folder that needs no Ray to act."""
    from dataclasses import asdict

    result = export_run(source, out, program=not weights_only)
    click.echo(json.dumps(asdict(result)) if as_json else result.text())


def export_run(source: Path, out: Path, *, program: bool = True) -> Exported:
    """Export the newest good checkpoint of the run `source`, or the checkpoint `source` of a run.

    Raises: ConfigError when it is neither, IntegrityError when nothing in it verifies, and as
    `export_policy`.
    """
    from deploy import assemble
    from deploy.evaluate import open_run
    from deploy.learner_role import signature
    from learner.checkpoint import check_signature
    from learner.export import export_policy
    from system.weights import PolicyVersion, Weights

    run, loaded = _load(source.absolute())
    config, env_spec = open_run(run.path)
    check_signature(signature(config, env_spec), loaded.meta["signature"])
    cpu = config.model_copy(update={"learner": config.learner.model_copy(update={"device": "cpu"})})
    agent = assemble.agent(cpu, env_spec)
    agent.load(loaded.state["agent"])
    state: dict[str, Any] = loaded.state
    version = PolicyVersion(int(state["publisher"]["epoch"]), int(state["publisher"]["counter"]))
    updates, env_steps = int(state["progress"]["updates"]), int(state["reader"]["limiter"]["inserted"])
    folder = export_policy(
        out,
        family=config.learner.family,
        settings=config.learner.settings,
        env=env_spec,
        weights=Weights.of(version, agent.weights()),
        source={
            "run": config.name,
            "environment": config.env.name,
            "checkpoint": loaded.path.name,
            "updates": updates,
            "env_steps": env_steps,
        },
        program=program,
    )
    return Exported(
        folder=str(folder),
        checkpoint=loaded.path.name,
        updates=updates,
        env_steps=env_steps,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )


def _load(source: Path) -> tuple[RunDirectory, Loaded]:
    """The run and the verified checkpoint that `source` names."""
    from learner.checkpoint import NAME, CheckpointStore

    inside = NAME.fullmatch(source.name) is not None and source.parent.name == "checkpoints"
    run = RunDirectory(source.parent.parent if inside else source)
    if not run.exists:
        raise ConfigError(
            f"{source} is neither a run directory nor a checkpoint in one (no {run.config_file}); give "
            "the path printed by train, or RUN/checkpoints/SERIAL-STEP"
        )
    store = CheckpointStore(run.checkpoints, keep=1)
    loaded = store.load(source) if inside else store.newest_sound()
    if loaded is None:
        raise ConfigError(f"{source} has no checkpoint yet; train longer")
    return run, loaded

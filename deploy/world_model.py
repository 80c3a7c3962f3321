"""Judge the world model of a run on its own replay: `dreamfleet eval RUN --world-model`.

Where the environment's equations are shipped (`learner.evaluation.simulators`), the truth about other actions
is asked for too. Leaves world-model.json and world-model.png in the run directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import assemble
from deploy.evaluate import load_agent
from deploy.pictures import plot_world_model
from deploy.run_config import RunConfig
from deploy.run_dir import RunDirectory
from system.errors import ConfigError, DeadlineError
from system.metrics import Metrics
from system.seeds import child_seed
from system.specs import EnvSpec

if TYPE_CHECKING:
    from learner.evaluation.harness import WorldModelReport
    from system.experience import Sequence

SEQUENCES = 64
SEEN_ROWS = 10
"""Rows seen before predicting: latents of imported rows are zeros, and take a few rows to become right."""
SAMPLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldModelEvaluation:
    """What was found, and where it was written. Made by `evaluate_world_model`, taken by the command line."""

    report: WorldModelReport
    updates: int  # of the checkpoint
    reference: str | None  # the simulator that knew the truth
    files: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        return self.report.to_json() | {
            "updates": self.updates,
            "reference": self.reference,
            "files": [str(path) for path in self.files],
        }

    def text(self) -> str:
        who = (
            f"beside the true {self.reference}"
            if self.reference
            else "without a simulator of its environment"
        )
        return "\n".join([f"world model after {self.updates} updates, {who}", self.report.text()])


def evaluate_world_model(path: Path, *, horizon: int, seed: int | None = None) -> WorldModelEvaluation:
    """Predict `horizon` rows of replayed stretches, and measure all that `learner.evaluation` can.

    Raises: ConfigError without checkpoint, or when the replay holds no stretch long enough.
    """
    import torch

    from learner.evaluation.harness import evaluate_model
    from learner.evaluation.oracle import OracleModel
    from learner.evaluation.rows import rows_of
    from learner.evaluation.simulators import simulator_of

    config, env_spec, agent, state = load_agent(path)
    rows = rows_of(agent, _stretches(config, env_spec, path, SEEN_ROWS + horizon), SEEN_ROWS)
    simulator = None if config.env.options else simulator_of(config.env.name, env_spec)
    nothing = torch.empty(0)
    report = evaluate_model(
        agent.model,
        rows,
        seed=child_seed(config.seed if seed is None else seed, "world_model"),
        reference=OracleModel(simulator) if simulator else None,
        policy=lambda latent, h: agent.behavior.act(latent["feat"], nothing, "eval"),
    )
    run_dir = RunDirectory(path)
    record = run_dir.path / "world-model.json"
    files = (record, plot_world_model(run_dir.path / "world-model.png", report))
    found = WorldModelEvaluation(
        report=report,
        updates=int(state["progress"]["updates"]),
        reference=simulator.spec.name if simulator else None,
        files=files,
    )
    run_dir.write_json(record, found.to_json())
    return found


def _stretches(config: RunConfig, env_spec: EnvSpec, path: Path, length: int) -> Sequence:
    """Replayed sequences of `length` rows. Raises: ConfigError when there are none."""
    from replay.offline import OfflineLedger

    longer = config.model_copy(
        update={"learner": config.learner.model_copy(update={"batch": SEQUENCES, "length": length})}
    )
    metrics = Metrics(config.name, "world_model")
    try:
        reader = assemble.replay_reader(longer, env_spec, str(path), (), metrics, limiter=OfflineLedger())
        try:
            return reader.sample(timeout=SAMPLE_SECONDS)
        finally:
            reader.close()
    except (DeadlineError, ConfigError) as error:  # not so many rows in a row, or never so many
        raise ConfigError(
            f"{path} has no {length} consecutive rows to predict ({error}); lower --horizon, or keep its "
            "replay/ directory"
        ) from error

"""The command line: one verb, one recipe, `--set a.b=c`. Imports nothing heavy until a command runs.

Exit codes: 0 done, 2 usage or configuration, 3 preflight, 4 training diverged, 5 data integrity,
6 infrastructure gave up, 75 stopped on request and resumable.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from deploy.export_cli import export
from deploy.replay_cli import replay

EXAMPLES = """\b
Examples:
  dreamfleet train cartpole
  dreamfleet train cartpole --backend local --set actors.count=1 --set seed=3
  dreamfleet train custom_env --set env.name=my_package.my_env:make --dry-run
  dreamfleet env check gym:CartPole-v1
  dreamfleet eval runs/cartpole-0
  dreamfleet export runs/cartpole-0 --out cartpole-policy
"""


def _say(value: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(value, default=str) if as_json else text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.group(
    epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="dreamfleet")
def cli() -> None:
    """Train world-model agents on real environments with a distributed actor-learner system."""


@cli.command()
@click.argument("recipe")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, e.g. actors.count=4.",
)
@click.option(
    "--backend",
    type=click.Choice(["ray", "local"]),
    help="Where roles run: a Ray cluster, or plain processes.",
)
@click.option(
    "--resume", type=click.Choice(["auto", "never", "require"]), default="auto", show_default=True,
    help="auto: go on where the run stopped; never: refuse an existing run; require: refuse a new one.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and the plan, start nothing.")
@json_option
def train(
    recipe: str, assignments: tuple[str, ...], backend: str | None, resume: str, dry_run: bool, as_json: bool
) -> None:
    """Train an agent: RECIPE is a shipped name (see `dreamfleet recipes`) or a YAML file."""
    from deploy.run_config import compose

    config, layers = compose(recipe, assignments, {"backend": backend} if backend else None)
    if dry_run:
        from deploy.plan import plan

        result = plan(config)
        _say(result.to_dict(), as_json, result.text(layers))
        return
    from deploy.train import train_run

    sys.exit(train_run(config, layers, resume=resume, as_json=as_json))


@cli.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the shipped recipes."""
    from deploy.run_config import RECIPES, recipe_names

    first = {
        n: (RECIPES / f"{n}.yaml").read_text().splitlines()[0].removeprefix("# ") for n in recipe_names()
    }
    _say(first, as_json, "\n".join(f"{name:14} {line}" for name, line in first.items()))


@cli.command(name="eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--episodes", type=click.IntRange(1), default=20, show_default=True, help="Episodes to play.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the episodes; default: the run's own.")
@click.option("--sample", is_flag=True, help="Sample actions as in training instead of the greedy policy.")
@click.option("--world-model", is_flag=True, help="Judge the world model on replayed rows instead.")
@click.option(
    "--horizon", type=click.IntRange(1), default=50, show_default=True,
    help="Rows the world model predicts.",
)  # fmt: skip
@json_option
def evaluate(
    run: Path, episodes: int, seed: int | None, sample: bool, world_model: bool, horizon: int, as_json: bool
) -> None:
    """Play episodes with the newest checkpoint of RUN, and with a random policy beside it."""
    from dataclasses import asdict

    if world_model:
        from deploy.world_model import evaluate_world_model

        found = evaluate_world_model(run, horizon=horizon, seed=seed)
        _say(found.to_json(), as_json, found.text())
        return

    from deploy.evaluate import evaluate_run

    report = evaluate_run(run, episodes, seed=seed, mode="train" if sample else "eval")
    _say(
        asdict(report), as_json,
        f"evaluation return {report.mean:.1f} over {len(report.returns)} "
        f"{'' if report.complete else '(time limit) '}episodes (random "
        f"{report.random_mean:.1f}), "
        f"std {report.std:.1f}, {report.env_steps} environment steps, {report.updates} updates",
    )  # fmt: skip


@cli.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where runs live.",
)
@json_option
def status(run: Path | None, root: Path, as_json: bool) -> None:
    """Show the roles and counters of RUN, or all runs under --root."""
    from deploy.status import list_runs, run_status

    result = run_status(run) if run else list_runs(root)
    _say(result.to_dict(), as_json, result.text())


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def audit(run: Path, as_json: bool) -> None:
    """Balance RUN's books: every acknowledged row stored, exactly once. Exit code 5 when not."""
    from deploy.audit import audit_run

    result = audit_run(run)
    _say(result.to_dict(), as_json, result.text())
    sys.exit(0 if result.balanced else 5)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def video(run: Path, as_json: bool) -> None:
    """Redraw RUN's learning curve and open-loop prediction."""
    from deploy.pictures import draw_curve, draw_open_loop

    files = [str(draw_curve(run)), *(str(path) for path in draw_open_loop(run))]
    _say({"files": files}, as_json, "\n".join(files))


@cli.command()
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where runs would live.",
)
@json_option
def doctor(root: Path, as_json: bool) -> None:
    """Check this machine: versions, device, ports, space, environments. Exit code 3 when not ready."""
    from deploy.doctor import examine

    report = examine(root)
    _say(report.to_dict(), as_json, report.text())
    sys.exit(0 if report.ready else 3)


@cli.group()
def env() -> None:
    """Work with environments."""


@env.command()
@click.argument("name")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Adapter option, e.g. action_repeat=2."
)
@json_option
def check(name: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Run the conformance kit on environment NAME (envpool:, gym:, dmc:, toy: or module:callable)."""
    from deploy.env_check import check_environment

    result = check_environment(name, assignments)
    _say(result.to_dict(), as_json, result.text())
    sys.exit(0 if result.passed else 2)


cli.add_command(replay)
cli.add_command(export)


def main() -> None:
    """Console entry: user errors become one screen on stderr and an exit code."""
    from deploy.log_lines import log_to_stderr
    from system.errors import DreamfleetError

    log_to_stderr(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    # A user's module:callable lives where the command is run: roles find it there, so must the evaluation.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(75)
    except DreamfleetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

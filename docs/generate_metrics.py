"""Writes docs/metrics.md from the catalogue in system/metrics.py, by `make docs`; a house test compares."""

from pathlib import Path

from system.metrics import Metric, catalogue_by_role

INTRODUCTION = """# Metrics

Generated from `system/metrics.py` by `make docs`; don't edit.

Every process serves its own `/metrics` page in Prometheus' text format, on loopback unless told otherwise.
Every series carries the labels `run`, `role` and `index`; the column below names the labels beyond those.
"""
TITLES = {
    "actor": "Actors",
    "replay": "Replay shards",
    "learner": "Learner",
    "params": "Parameter server",
    "driver": "Driver",
}


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `dreamfleet_{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for role, metrics in catalogue_by_role().items():
        rows = "\n".join(_row(metric) for metric in metrics)
        parts.append(
            f"## {TITLES.get(role, role)}\n\n| name | kind | labels | meaning |\n|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("metrics.md").write_text(render())

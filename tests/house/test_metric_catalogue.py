"""Every metric follows Prometheus' naming rules (those promtool checks, and ours) and is documented."""

import importlib.util
import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from system.metrics import CATALOGUE, Metric, Metrics

ROLES = {"actor", "replay", "learner", "params", "driver"}
OTHER_UNITS = {
    "ms", "us", "ns", "millis", "milliseconds", "microseconds", "minutes", "hours", "days",
    "kb", "mb", "gb", "kilobytes", "megabytes", "mebibytes", "percent", "pct",
}  # fmt: skip
RESERVED_LABELS = {"le", "quantile", "run", "role", "index", "job", "instance"}
KIND_WORDS = {"counter", "gauge", "histogram", "summary", "metric"}


def good_label(label: str) -> bool:
    return bool(re.fullmatch(r"[a-z][a-z_]*", label)) and label not in RESERVED_LABELS


def faults(metric: Metric) -> list[str]:
    words = metric.name.split("_")
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name):
        found.append("name must be lower-case words joined by single underscores")
    if words[0] not in ROLES:
        found.append(f"first word must be one of {sorted(ROLES)}")
    if (metric.kind == "counter") != (words[-1] == "total"):
        found.append("counters, and only counters, end in _total")
    if set(words) & OTHER_UNITS:
        found.append("units are base units: seconds, bytes, ratio")
    if set(words) & KIND_WORDS or words[-1] in {"count", "sum", "bucket", "info"}:
        found.append("names carry no type and no suffix Prometheus adds itself")
    if metric.kind == "histogram" and list(metric.buckets) != sorted(set(metric.buckets)):
        found.append("buckets must grow")
    if not re.fullmatch(r"[A-Z].{8,}\.", metric.help):
        found.append("help must be a sentence")
    found += [f"label {label!r} is reserved or misspelt" for label in metric.labels if not good_label(label)]
    return found


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda m: m.name)
def test_metric_is_well_named(metric: Metric) -> None:
    assert not faults(metric)


@pytest.mark.parametrize(
    "metric",
    [
        Metric(name="learner_update_ms", kind="histogram", help="Time of one update."),
        Metric(name="learner_updates", kind="counter", help="Gradient updates done."),
        Metric(name="learner_loss_total", kind="gauge", help="Newest loss by part."),
        Metric(name="Learner_loss", kind="gauge", help="Newest loss by part."),
        Metric(name="learner_loss", kind="gauge", help="loss"),
        Metric(name="learner_loss", kind="gauge", help="Newest loss by part.", labels=("run",)),
    ],
)
def test_bad_metric_is_recognised(metric: Metric) -> None:
    assert faults(metric)


def test_names_are_unique() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(names) == len(set(names))


def test_every_metric_can_be_exported_and_parsed() -> None:
    metrics = Metrics("run", "test")
    for metric in CATALOGUE:
        made = (
            metrics.labels(metric.name, **dict.fromkeys(metric.labels, "x"))
            if metric.labels
            else metrics[metric.name]
        )
        {"counter": lambda m: m.inc(), "gauge": lambda m: m.set(1), "histogram": lambda m: m.observe(1)}[
            metric.kind
        ](made)
    families = {f.name for f in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    assert families >= {f"dreamfleet_{metric.name}".removesuffix("_total") for metric in CATALOGUE}


def test_metrics_page_is_generated_from_the_catalogue(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate_metrics", root / "docs" / "generate_metrics.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "metrics.md").read_text() == module.render(), (
        "run `make docs` and commit the result"
    )

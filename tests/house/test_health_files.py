"""The health page and the alert rules are what the alarms say, and every metric in a rule exists."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.replay_config import ReplayConfig
from learner.families.dreamer.config import DreamerConfig, LossScales
from learner.health.alarms import ALARMS, BY_NAME
from learner.health.readings import RULES
from system.metrics import CATALOGUE

LABELS = {metric.name: {*metric.labels, "run", "role", "index"} for metric in CATALOGUE}
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def generator(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("generate_health", root / "docs" / "generate_health.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rules(root: Path) -> list[dict[str, Any]]:
    text = (root / "deploy" / "alerts" / "learner_health.yaml").read_text()
    (group,) = yaml.safe_load(text)["groups"]
    return group["rules"]


def unknown_series(expr: str) -> list[str]:
    """What an expression names that no process exports: series, or labels of one."""
    found = []
    for name, _, matchers in re.findall(r"dreamfleet_(\w+)(\{([^}]*)\})?", expr):
        plain = next((name.removesuffix(p) for p in HISTOGRAM_PARTS if name.endswith(p)), name)
        known = LABELS.get(name) or LABELS.get(plain)
        if known is None:
            found.append(name)
        else:
            found += [label for label in re.findall(r"(\w+)\s*[=!]", matchers) if label not in known]
    return found


def test_page_and_rules_are_generated_from_the_alarms(generator: Any, root: Path) -> None:
    assert (root / "docs" / "health.md").read_text() == generator.page(), "run `make docs` and commit"
    written = (root / "deploy" / "alerts" / "learner_health.yaml").read_text()
    assert written == generator.rules(), "run `make docs` and commit"


def test_every_metric_and_label_in_a_rule_is_in_the_catalogue(rules: list[dict[str, Any]]) -> None:
    assert len(rules) > len(ALARMS)
    assert not {rule["alert"]: bad for rule in rules if (bad := unknown_series(rule["expr"]))}


@pytest.mark.parametrize(
    "expr", ["dreamfleet_learner_helth == 1", 'dreamfleet_learner_health{alrm="x"} == 1']
)
def test_unknown_series_are_recognised(expr: str) -> None:
    assert unknown_series(expr)


def test_every_alarm_has_exactly_one_rule_that_names_it(rules: list[dict[str, Any]]) -> None:
    named = [name for rule in rules for name in re.findall(r'alarm="(\w+)"', rule["expr"])]
    assert sorted(named) == sorted(BY_NAME)


def test_rules_are_of_the_form_prometheus_loads(rules: list[dict[str, Any]]) -> None:
    names = [rule["alert"] for rule in rules]
    assert len(names) == len(set(names))
    for rule in rules:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[A-Z]\w+", rule["alert"])
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "remedy", "page"}


def test_every_rule_of_the_monitor_has_words(generator: Any) -> None:
    assert RULES.keys() <= BY_NAME.keys()
    assert BY_NAME.keys() - RULES.keys() == {"nonfinite", "ratio_drift", "imagination_drift"}
    for alarm in ALARMS:
        assert min(len(alarm.watches), len(alarm.cause), len(alarm.remedy)) > 30, alarm.name
        assert not alarm.remedy.endswith("."), "sentences are made where they are shown"


def named_settings(text: str) -> set[str]:
    """Settings of the learner and the replay that a text tells somebody to turn."""
    dotted = set(re.findall(r"\b(?:learner|replay)(?:\.[a-z_]+)+\b", text))
    return dotted | {f"learner.settings.{part}" for part in re.findall(r"(?<![.\w])scales\.[a-z_]+", text)}


def test_settings_that_remedies_name_exist() -> None:
    fields = {f"learner.settings.{name}" for name in DreamerConfig.model_fields}
    fields |= {f"learner.settings.scales.{name}" for name in LossScales.model_fields} | {"learner.settings"}
    fields |= {f"replay.{name}" for name in ReplayConfig.model_fields}
    told = {alarm.name: named_settings(alarm.remedy) for alarm in ALARMS}
    assert sum(map(len, told.values())) > 15
    assert not {name: strange for name, found in told.items() if (strange := found - fields)}


def test_scrape_settings_in_the_docs_are_such_as_prometheus_takes(root: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (root / "docs" / "operations.md").read_text(), re.M | re.S)
    (jobs,) = [
        found["scrape_configs"] for block in blocks if "scrape_configs" in (found := yaml.safe_load(block))
    ]
    files = [file for job in jobs for part in job["file_sd_configs"] for file in part["files"]]
    assert files
    for file in files:  # its own rule: an asterisk in the last part only
        assert re.fullmatch(r"[^*]*(\*[^/]*)?\.(json|yml|yaml)", file), file

"""docs/fidelity.md is what the code is: equations, tests, departures, protocols and scores."""

import ast
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from deploy.run_config import RECIPES, compose

MARKER = re.compile(r"Paper: |Ours[,:] |(?<=\s)\(ours\)")
OFFICIAL: dict[str, dict[str, Any]] = {
    # configs.yaml of danijar/dreamerv3 at e3f0224: defaults, then the block of this name.
    "dmc_proprio": {"size": "size1m", "ratio": 1024, "envs": 16, "rows": 1_100_000},
    "dmc_vision": {"size": "size200m", "ratio": 256, "envs": 16, "rows": 1_100_000},
    "atari100k": {"size": "size200m", "ratio": 256, "envs": 1, "rows": 110_000},
    "crafter": {"size": "size200m", "ratio": 512, "envs": 1, "rows": 1_100_000},
}
DEFAULTS = {"dtype": "bf16", "capacity": 5_000_000, "batch": 16, "length": 64, "context": 1}


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "fidelity.md").read_text()


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table of a section, by column title."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, rows = cells[0], cells[2:]
    assert all(len(row) == len(head) for row in rows), rows
    return [dict(zip(head, row, strict=True)) for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def recipe(name: str) -> dict[str, Any]:
    """What a recipe asks for, in the words of the page."""
    config, _ = compose(name, ())
    settings = config.learner.settings
    return {
        "size": settings["size"],
        "ratio": config.replay.train_ratio,
        "envs": config.actors.count * config.actors.envs,
        "rows": config.env_steps,
        "dtype": settings.get("dtype", "fp32"),
        "capacity": config.replay.capacity,
        "batch": config.learner.batch,
        "length": config.learner.length,
        "context": config.learner.context,
    }


def protocol(name: str) -> tuple[str, set[str]]:
    """(protocol, names of what differs) as the comment of a recipe says."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("# Protocol: ")]
    assert at < 3, f"{name} names its protocol too late"
    said = lines[at].removeprefix("# Protocol: ")
    for line in lines[at + 1 :]:
        if not line.startswith("# "):
            break
        said += line.removeprefix("#")
    differs = said.partition("differs: ")[2]
    return said.split()[0].rstrip(";"), set(re.findall(r"(\w+) \(", differs))


def test_every_equation_names_functions_and_golden_tests_that_exist(page: str, root: Path) -> None:
    rows = table(section(page, "Equations"))
    assert len(rows) > 20
    missing = []
    for row in rows:
        functions, tests = quoted(row["function"]), quoted(row["golden test"])
        assert functions, row
        assert tests, row
        assert all(name.startswith("tests/golden/learner/") for name in tests), row
        for name in (*functions, *tests):
            path, _, symbol = name.partition("::")
            assert symbol, name
            if not (root / path).is_file() or symbol not in defined(root / path):
                missing.append(name)
    assert not missing


def test_every_golden_test_file_of_the_learner_stands_behind_an_equation(page: str, root: Path) -> None:
    named = {
        q.split("::")[0] for row in table(section(page, "Equations")) for q in quoted(row["golden test"])
    }
    files = {str(p.relative_to(root)) for p in (root / "tests/golden/learner").glob("test_*.py")}
    assert files <= named, files - named


def test_every_file_that_marks_a_departure_is_in_the_table(page: str, root: Path) -> None:
    named = {q for row in table(section(page, "Departures")) for q in quoted(row["file"])}
    marked = {
        str(path.relative_to(root))
        for path in (root / "learner").rglob("*.py")
        if MARKER.search(path.read_text())
    }
    assert marked
    assert marked <= named, marked - named
    assert not [name for name in named if not (root / name).is_file()]


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_recipe_names_its_protocol_and_every_difference_from_it(name: str, page: str) -> None:
    said, differs = protocol(name)
    (row,) = [r for r in table(section(page, "Protocols")) if r["recipe"] == f"`{name}`"]
    assert said == row["protocol"]
    ours = recipe(name)
    assert (row["size"], row["train ratio"], row["environments"], row["rows"]) == (
        ours["size"], f"{ours['ratio']:g}", str(ours["envs"]), f"{ours['rows']:,}",
    )  # fmt: skip
    assert {word.strip() for word in row["differs from it in"].split(",")} - {""} == differs
    if said == "official":
        official = DEFAULTS | OFFICIAL[name]
        assert {key for key in official if official[key] != ours[key]} == differs
    else:
        assert said == "ours"
        assert not differs
        assert name not in OFFICIAL


@pytest.mark.parametrize("suite", ["dmc_proprio", "dmc_vision"])
def test_reference_scores_are_the_stored_ones_and_ours_come_from_results(
    suite: str, page: str, root: Path
) -> None:
    results = root / "docs" / "results"
    stored = json.loads((results / "reference-dmc.json").read_text())["tasks"][suite]
    block = page.split(f"<!-- reference {suite} begin -->")[1].split(f"<!-- reference {suite} end -->")[0]
    rows = table(block)
    assert {row["task"] for row in rows} == stored["scores"].keys()
    for row in rows:
        for steps, score in zip(stored["steps"], stored["scores"][row["task"]]["at"], strict=True):
            assert row[f"{steps // 1000}k"] == f"{score['mean']:.0f} ± {score['std']:.0f}", row
        check_ours(row, suite, results)


def check_ours(row: dict[str, str], suite: str, results: Path) -> None:
    """Each own score is the mean over the seeds of the file that holds it; none is left out."""
    prefix = {"dmc_proprio": "dmc_", "dmc_vision": "dmc_vision_"}[suite]  # as the cases of bench.proof
    file = results / f"proof-{prefix}{row['task']}.json"
    keys = {"ours, sampled": "training_return", "ours, greedy": "return"}
    if not file.exists():
        assert {row[title] for title in keys} == {"not run"}, row
        return
    runs = json.loads(file.read_text())["rows"]
    for title, key in keys.items():
        found = [run[key] for run in runs if key in run]
        assert row[title] == (f"{mean(found):.0f}" if found else "not run"), (row, file.name)


def test_a_wrong_score_would_be_noticed(tmp_path: Path) -> None:
    row = {"task": "walker_walk", "ours, sampled": "930", "ours, greedy": "not run"}
    with pytest.raises(AssertionError):
        check_ours(row, "dmc_proprio", tmp_path)
    file = tmp_path / "proof-dmc_walker_walk.json"
    file.write_text('{"rows": [{"training_return": 920}, {"training_return": 940}]}')
    check_ours(row, "dmc_proprio", tmp_path)
    file.write_text('{"rows": [{"training_return": 920, "return": 950}]}')
    with pytest.raises(AssertionError):
        check_ours(row, "dmc_proprio", tmp_path)

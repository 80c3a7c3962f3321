"""The targets people and CI call exist and lead somewhere."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

TARGETS = {
    "setup",
    "demo",
    "test",
    "drills",
    "lint",
    "types",
    "layers",
    "proof",
    "bench",
    "chaos",
    "chaos-replay",
    "bare",
    "proto",
    "docs",
    "clean",
}


@pytest.fixture(scope="module")
def makefile(root: Path) -> str:
    return (root / "Makefile").read_text()


def test_promised_targets_exist_and_are_explained(makefile: str) -> None:
    explained = set(re.findall(r"^([a-z-]+):.*## \w", makefile, re.M))
    assert explained == TARGETS | {"help"}


def test_every_module_a_target_runs_can_be_found(makefile: str) -> None:
    modules = set(re.findall(r"python -m (bench[.\w]*)", makefile))
    assert modules
    missing = []
    for name in modules:
        spec = find_spec(name)
        if spec is None or (spec.submodule_search_locations and find_spec(f"{name}.__main__") is None):
            missing.append(name)
    assert not missing


def test_ci_runs_what_the_readme_says(root: Path) -> None:
    assert re.search(r"^make test", (root / ".ci" / "run").read_text(), re.M)
    readme = (root / "README.md").read_text()
    assert re.search(r"^make demo ", readme, re.M)
    assert re.search(r"^make test ", readme, re.M)


def test_torch_is_pinned_without_a_local_suffix(root: Path) -> None:
    lines = [
        line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    assert len(lines) == 1
    assert re.fullmatch(r"torch==[0-9.]+", lines[0])

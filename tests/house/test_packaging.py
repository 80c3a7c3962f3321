"""What is declared is what is used, pinned, documented and generated; and our names are ours."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

USED_BY_NAME = {"minigrid", "setuptools"}
"""Imported by gymnasium through the environment id, or by the build alone."""


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): number for name, number in pairs}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def declared(project: dict[str, Any], *, dev: bool) -> dict[str, Requirement]:
    return requirements(project["optional-dependencies"]["dev"] if dev else project["dependencies"])


def extras(project: dict[str, Any]) -> dict[str, Requirement]:
    lists = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    return requirements([line for lines in lists.values() for line in lines])


def imported(files: list[Path]) -> set[str]:
    """Top-level names of every absolute import, lazy ones too."""
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_no_installed_distribution_owns_our_names(rooms: tuple[str, ...]) -> None:
    owners = packages_distributions()
    assert not {
        name: owners[name] for name in (*rooms, "tests") if set(owners.get(name, [])) - {"dreamfleet"}
    }


def test_every_third_party_import_is_declared(
    project: dict[str, Any], sources: list[Path], rooms: tuple[str, ...]
) -> None:
    allowed = {*declared(project, dev=False), *declared(project, dev=True), *extras(project), "packaging"}
    owners = packages_distributions()
    stray = {}
    # The peers run in an environment of their own, whose pins are in bench.replay_peers.
    ours = [path for path in sources if "peers" not in path.parts]
    for name in imported(ours) - {*rooms, "tests"}:
        distributions = {canonicalize_name(d) for d in owners.get(name, [name])}
        if not distributions & allowed:
            stray[name] = sorted(distributions)
    assert not stray


def test_rooms_import_no_development_tool(
    project: dict[str, Any], sources: list[Path], root: Path, rooms: tuple[str, ...]
) -> None:
    files = [p for p in sources if p.relative_to(root).parts[0] in rooms]
    owners = packages_distributions()
    used = {canonicalize_name(d) for name in imported(files) for d in owners.get(name, [])}
    assert not used & (set(declared(project, dev=True)) - set(declared(project, dev=False)))


def test_every_runtime_dependency_is_imported(
    project: dict[str, Any], sources: list[Path], root: Path
) -> None:
    owners = packages_distributions()
    files = [p for p in sources if p.relative_to(root).parts[0] != "tests"]
    files += sorted(root.glob("*/**/*_pb2*.py"))
    files = [p for p in files if ".venv" not in p.parts]
    used = {canonicalize_name(d) for name in imported(files) for d in owners.get(name, [])}
    unused = set(declared(project, dev=False)) - used - USED_BY_NAME
    assert not unused


def test_every_dependency_is_pinned_inside_its_range(project: dict[str, Any], pins: dict[str, str]) -> None:
    for name, requirement in (declared(project, dev=False) | declared(project, dev=True)).items():
        assert requirement.specifier.contains(pins[name]), (
            f"{requirement} does not allow the pin {pins[name]}"
        )


def test_every_installed_dependency_is_the_pinned_one(pins: dict[str, str], project: dict[str, Any]) -> None:
    for name in declared(project, dev=False) | declared(project, dev=True):
        assert version(name).partition("+")[0] == pins[name]


def test_dependency_page_lists_exactly_what_is_declared(project: dict[str, Any], root: Path) -> None:
    page = (root / "docs" / "dependencies.md").read_text()
    sections = {
        "## Runtime": declared(project, dev=False),
        "## Development": declared(project, dev=True),
        "## Extras": extras(project),
    }
    for heading, names in sections.items():
        section = page.split(heading, 1)[1].split("\n## ", 1)[0]
        rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.M)
        assert [name for name, why in rows if len(why) < 10] == []
        assert sorted(canonicalize_name(n) for n, _ in rows) == sorted(names)


def proto_files(root: Path, rooms: tuple[str, ...]) -> list[Path]:
    return sorted(p.relative_to(root) for room in rooms for p in (root / room).rglob("*.proto"))


def test_committed_grpc_code_is_what_the_proto_files_say(
    root: Path, rooms: tuple[str, ...], tmp_path: Path
) -> None:
    files = proto_files(root, rooms)
    assert files
    flags = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *flags, *map(str, files)],
        cwd=root,
        check=True,
        timeout=60,
    )
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*_pb2*"))
    assert made
    drifted = [
        str(p)
        for p in made
        if not (root / p).exists() or (root / p).read_bytes() != (tmp_path / p).read_bytes()
    ]
    assert not drifted, "run `make proto` and commit the result"


def test_dependency_floors_allow_the_generated_code(
    root: Path, rooms: tuple[str, ...], project: dict[str, Any]
) -> None:
    runtime = declared(project, dev=False)
    for proto in proto_files(root, rooms):
        messages = (root / proto).with_name(f"{proto.stem}_pb2.py").read_text()
        numbers = re.search(r"Protobuf Python Version: ([\d.]+)", messages)
        services = (root / proto).with_name(f"{proto.stem}_pb2_grpc.py").read_text()
        grpc = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", services)
        assert numbers
        assert grpc
        assert not runtime["protobuf"].specifier.contains(below(numbers[1])), numbers[1]
        assert not runtime["grpcio"].specifier.contains(below(grpc[1])), grpc[1]


def below(number: str) -> str:
    """A version just under `number`'s minor release."""
    major, minor, *_ = (int(part) for part in number.split("."))
    return f"{major}.{minor - 1}.999" if minor else f"{major - 1}.999"

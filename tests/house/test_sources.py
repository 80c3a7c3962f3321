"""Sizes stay readable, and nothing loads code from data."""

import ast
from pathlib import Path

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FAMILY_LINES = 1200
CODE_FROM_DATA = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_FLAGS = {("allow_pickle", True), ("weights_only", False), ("shell", True)}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def safe_yaml_load(call: ast.Call, tree: ast.AST) -> bool:
    """True for yaml.load with yaml.SafeLoader or a class of this file that extends it."""
    safe = {"yaml.SafeLoader"}
    safe |= {
        n.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ClassDef) and "yaml.SafeLoader" in map(dotted, n.bases)
    }
    loaders = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "Loader")]
    return dotted(call.func) == "yaml.load" and [dotted(n) in safe for n in loaders] == [True]


def unsafe_parts(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in CODE_FROM_DATA]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in CODE_FROM_DATA else []
        elif isinstance(node, ast.Call):
            unsafe = dotted(node.func) in UNSAFE_CALLS and not safe_yaml_load(node, tree)
            found += [dotted(node.func)] if unsafe else []
            found += [
                f"{k.arg}={k.value.value}"
                for k in node.keywords
                if isinstance(k.value, ast.Constant) and (k.arg, k.value.value) in UNSAFE_FLAGS
            ]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "x = eval(text)",
        "numpy.load(f, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_unsafe_line_is_recognised(line: str) -> None:
    assert unsafe_parts(ast.parse(line))


def test_nothing_loads_code_from_data(root: Path, sources: list[Path]) -> None:
    found = {
        str(p.relative_to(root)): parts for p in sources if (parts := unsafe_parts(ast.parse(p.read_text())))
    }
    assert not found


def test_files_stay_small(root: Path, sources: list[Path]) -> None:
    sizes = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in sources}
    assert not {path: lines for path, lines in sizes.items() if lines > MAX_FILE_LINES}


def test_functions_stay_small(root: Path, sources: list[Path]) -> None:
    long = {}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(root)}:{node.name}"] = lines
    assert not long


def test_families_stay_small(root: Path) -> None:
    sizes = {
        folder.name: sum(len(p.read_text().splitlines()) for p in folder.rglob("*.py"))
        for folder in (root / "learner" / "families").iterdir()
        if (folder / "__init__.py").exists()
    }
    assert sizes
    assert not {name: lines for name, lines in sizes.items() if lines > MAX_FAMILY_LINES}


def test_no_file_is_a_drawer(root: Path, sources: list[Path]) -> None:
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py", "base.py"}
    assert not [str(p.relative_to(root)) for p in sources if p.name in drawers]


def test_tests_have_no_package_files(root: Path) -> None:
    assert not list((root / "tests").rglob("__init__.py"))


def test_test_files_have_unique_names(root: Path) -> None:
    names = [p.name for p in (root / "tests").rglob("test_*.py")]
    assert not sorted({name for name in names if names.count(name) > 1})

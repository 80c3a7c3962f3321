"""The floors of the house hold, and the check that says so can fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAYERED = ("system", "replay", "actors", "learner", "deploy")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as main; "
        "main(['--no-cache', '--no-logo'])"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copied_house(root: Path, tmp_path: Path) -> Path:
    for room in LAYERED:
        shutil.copytree(root / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_layers_are_kept(root: Path) -> None:
    done = lint_imports(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("system/planted.py", "import replay"),
        ("replay/planted.py", "import learner"),
        ("actors/planted.py", "import learner"),
        ("learner/planted.py", "import gymnasium"),
        ("actors/planted.py", "import zarr"),
    ],
)
def test_planted_import_is_caught(copied_house: Path, module: str, statement: str) -> None:
    (copied_house / module).write_text(f"{statement}\n")
    done = lint_imports(copied_house)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout, done.stdout + done.stderr

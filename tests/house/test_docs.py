"""What the docs name exists: files, functions, links; and decisions stay short."""

import ast
import re
from pathlib import Path

import pytest

MAX_DECISION_LINES = 40
SUFFIXES = (".py", ".yaml", ".toml", ".txt", ".proto", ".md", ".json")


@pytest.fixture(scope="module")
def pages(root: Path) -> dict[str, str]:
    paths = [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    return {str(p.relative_to(root)): p.read_text() for p in paths}


def named_files(text: str, rooms: tuple[str, ...]) -> set[str]:
    """Backticked paths into the checkout, with the symbol after '::' where there is one."""
    heads = (*rooms, "tests", "docs")
    quoted = re.findall(r"`([\w./-]+(?:::\w+)?)`", text)
    return {q for q in quoted if q.split("/")[0] in heads and q.split("::")[0].endswith((*SUFFIXES, "/"))}


def defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_every_named_file_and_function_exists(
    pages: dict[str, str], root: Path, rooms: tuple[str, ...]
) -> None:
    missing = []
    count = 0
    for page, text in pages.items():
        for name in named_files(text, rooms):
            path, _, symbol = name.partition("::")
            found = (root / path).is_dir() if path.endswith("/") else (root / path).is_file()
            if not found or (symbol and symbol not in defined(root / path)):
                missing.append(f"{page}: {name}")
            count += 1
    assert count > 30
    assert not missing


def broken_links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def test_every_relative_link_leads_somewhere(pages: dict[str, str], root: Path) -> None:
    assert not {page: broken for page in pages if (broken := broken_links(root / page))}


def test_decisions_are_short_and_numbered(root: Path) -> None:
    files = sorted((root / "docs" / "decisions").glob("*.md"))
    assert [int(p.name[:4]) for p in files] == list(range(1, len(files) + 1))
    for path in files:
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_DECISION_LINES, path.name
        assert text.startswith(f"# {path.name[:4]} "), path.name
        assert all(f"**{part}.**" in text for part in ("Context", "Choice", "Price")), path.name

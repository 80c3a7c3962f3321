"""The file tree in README.md is true in both directions."""

import re
from pathlib import Path


def tree_paths(text: str) -> list[str]:
    """Paths of the fenced tree under '## File tree': two spaces of indent a level, then the name."""
    block = re.search(r"^## File tree\n.*?^```text\n(.*?)^```", text, re.M | re.S)
    assert block, "README.md needs a ```text block under '## File tree'"
    parents: list[str] = []
    paths = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents[depth:] = [name.rstrip("/")]
        paths.append("/".join(parents[: depth + 1]) + ("/" if name.endswith("/") else ""))
    return paths


def test_tree_parser_reads_nesting() -> None:
    text = "## File tree\n```text\na/   one\n  b/\n    c.py  three\n  d.py\n```\n"
    assert tree_paths(text) == ["a/", "a/b/", "a/b/c.py", "a/d.py"]


def test_every_path_in_the_tree_exists(root: Path) -> None:
    missing = []
    for path in tree_paths((root / "README.md").read_text()):
        found = (root / path).is_dir() if path.endswith("/") else (root / path).is_file()
        if not found:
            missing.append(path)
    assert not missing


def test_every_package_is_in_the_tree(root: Path, rooms: tuple[str, ...]) -> None:
    named = set(tree_paths((root / "README.md").read_text()))
    packages = {
        f"{init.parent.relative_to(root)}/" for room in rooms for init in (root / room).rglob("__init__.py")
    }
    assert packages <= named, sorted(packages - named)

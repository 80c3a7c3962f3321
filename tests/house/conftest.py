"""Fixtures of the house tests: where the checkout is, and which Python files a person wrote."""

from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = ("system", "replay", "actors", "learner", "deploy", "bench")


@pytest.fixture(scope="session")
def root() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def rooms() -> tuple[str, ...]:
    return ROOMS


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """Every Python file of the rooms and tests that is written by hand."""
    found = [p for room in (*ROOMS, "tests", "docs") for p in sorted((CHECKOUT / room).rglob("*.py"))]
    return [p for p in found if "_pb2" not in p.name and "__pycache__" not in p.parts]

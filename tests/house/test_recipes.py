"""Every shipped recipe composes into a run, says why its values are what they are, and is documented."""

from pathlib import Path

import pytest

from deploy.run_config import RECIPES

SHIPPED = {
    *("cartpole", "minigrid", "pendulum", "pong_pixels"),  # two CPU cores
    *("dmc_proprio", "dmc_vision", "atari100k", "crafter", "custom_env"),
}


def test_shipped_recipes_are_the_promised_ones() -> None:
    assert {p.stem for p in RECIPES.glob("*.yaml")} == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_recipe_starts_by_saying_what_it_is(name: str) -> None:
    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_readme_names_every_recipe(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert not [name for name in SHIPPED if f"`{name}`" not in text]

"""Strict configuration: origins, nearest keys, refused YAML."""

from pathlib import Path

import pytest
from pydantic import Field

from system.config import Layers, StrictConfig, build, flatten, origin_of, parse_assignment, read_yaml
from system.errors import ConfigError


class Inner(StrictConfig):
    rate: float = Field(1.0, gt=0)


class Outer(StrictConfig):
    name: str = "x"
    inner: Inner = Inner()


def test_later_layers_win_and_each_value_remembers_its_origin() -> None:
    layers = (
        Layers().add({"inner": {"rate": 2.0}}, "recipe.yaml", {"inner.rate": 7}).add({"name": "y"}, "--set")
    )
    config = build(Outer, layers)
    assert (config.name, config.inner.rate) == ("y", 2.0)
    assert origin_of(layers, "inner.rate") == "recipe.yaml:7"
    assert origin_of(layers, "name") == "--set"


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key inner\.rtae .*did you mean inner\.rate\?"):
        build(Outer, Layers().add({"inner": {"rtae": 1}}, "--set"))


def test_a_bad_value_names_key_value_and_origin() -> None:
    with pytest.raises(ConfigError, match=r"inner\.rate = -1 \(from r\.yaml:3\).*greater than 0"):
        build(Outer, Layers().add({"inner": {"rate": -1}}, "r.yaml", {"inner.rate": 3}))


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_non_finite_numbers_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="finite"):
        build(Outer, Layers().add(parse_assignment(f"inner.rate={value}"), "--set"))


def test_assignments_read_their_value_as_yaml() -> None:
    assert parse_assignment("a.b=[1, x]") == {"a": {"b": [1, "x"]}}
    for bad in ("a", "=1", "a..b=1", ".=1", "a=[1", "a=2024-13-45"):
        with pytest.raises(ConfigError, match="--set"):
            parse_assignment(bad)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "2: key 'a' appears twice"),
        ("a: &x 1\nb: *x\n", "aliases are not accepted"),
        ("- 1\n", "must hold a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_yaml(path)


def test_huge_absent_and_bom_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="must be <="):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "absent.yaml")
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path) == ({"a": 1}, {"a": 1})


def test_flatten_gives_dotted_leaves() -> None:
    assert flatten(Outer()) == {"name": "x", "inner.rate": 1.0}

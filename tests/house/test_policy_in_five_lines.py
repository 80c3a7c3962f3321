"""The five lines of the README act with an exported policy where no other heavy package can be imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from learner.catalog import make_config, make_policy
from learner.export import export_policy
from system.specs import ActionSpec, ArraySpec, EnvSpec
from system.weights import PolicyVersion, Weights

REFUSED = ("ray", "envpool", "gymnasium", "zarr", "grpc")
RUN = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError(f"{{name}} is refused")
        return None


sys.meta_path.insert(0, Refuse())
{lines}
assert action.shape == (1, 1) and action.dtype == np.int32, action
assert not set({refused}) & set(sys.modules)
sys.stdout.write("acted")
"""
CARTPOLE = EnvSpec(
    name="cartpole",
    obs={"vector": ArraySpec(shape=(4,), dtype="float32")},
    action=ActionSpec(kind="discrete", classes=(2,)),
)


def five_lines(page: Path) -> str:
    """The one Python block that loads a policy."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    (found,) = [block for block in blocks if "load_policy" in block]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    policy = make_policy("dreamer", make_config("dreamer", {"size": "nano"}), CARTPOLE, seed=0, threads=0)
    arrays = {name: p.numpy() for name, p in policy.plain.named_parameters()}
    return export_policy(
        tmp_path / "cartpole-policy",
        family="dreamer",
        settings={"size": "nano"},
        env=CARTPOLE,
        weights=Weights.of(PolicyVersion(1, 1), arrays),
        source={},
        program=False,
    )


def test_five_lines_act_without_ray_or_environments(root: Path, folder: Path) -> None:
    lines = five_lines(root / "README.md")
    assert sum(bool(line) for line in lines.splitlines()) == 5
    code = RUN.format(refused=REFUSED, lines=lines)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "acted", done.stderr


def test_pages_show_the_same_lines(root: Path) -> None:
    assert five_lines(root / "README.md") == five_lines(root / "docs" / "policies.md")

"""Plain processes, the learner and its benchmark load where neither ray nor envpool can be imported."""

import subprocess
import sys
from pathlib import Path

REFUSE = """
import importlib, pkgutil, sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "envpool"):
            raise ImportError(f"{name} is refused")
        return None


sys.meta_path.insert(0, Refuse())
names = sys.argv[1:]
learner = importlib.import_module("learner")
names += [module.name for module in pkgutil.walk_packages(learner.__path__, "learner.")]
for name in names:
    importlib.import_module(name)
assert not {"ray", "envpool"} & set(sys.modules)
from actors.envs.catalog import make_env

make_env("gym:CartPole-v1", 1).close()
sys.stdout.write(str(len(names)))
"""
LOCAL = [
    f"deploy.{name}"
    for name in (
        "__main__", "assemble", "audit", "doctor", "driver", "env_check", "evaluate", "export_cli",
        "learner_role", "local", "pictures", "plan", "probe", "progress", "role_process", "roles",
        "run_config", "session", "status", "train",
    )
]  # fmt: skip


def refused(root: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE, *names], cwd=root, capture_output=True, text=True, timeout=120
    )


def test_local_backend_and_learner_need_neither_ray_nor_envpool(root: Path) -> None:
    done = refused(root, *LOCAL, "bench.learner")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(LOCAL) + 10


def test_the_refusal_refuses(root: Path) -> None:
    done = refused(root, "deploy.ray_fleet")
    assert done.returncode != 0
    assert "ray is refused" in done.stderr

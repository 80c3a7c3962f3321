"""ray_cluster.yaml passes Ray's own loader, and holds what its loader does not check."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

VALIDATE = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
config = prepare_config(yaml.safe_load(open(sys.argv[1])))
validate_config(config)
print("valid", config["cluster_name"])
"""


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    """In an interpreter of its own: importing Ray's autoscaler warns, and warnings are errors here."""
    return subprocess.run(
        [sys.executable, "-c", VALIDATE, str(path)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def cluster(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "ray_cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file(root: Path) -> None:
    done = validate(root / "ray_cluster.yaml")
    assert done.stdout.splitlines()[-1:] == ["valid dreamfleet"], done.stderr


@pytest.mark.parametrize("change", [{"min_worker": 1}, {"head_node_type": "missing"}, {"max_workers": 1}])
def test_ray_refuses_a_broken_cluster_file(
    cluster: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    broken = tmp_path / "cluster.yaml"
    broken.write_text(yaml.safe_dump(cluster | change))
    done = validate(broken)
    assert done.returncode != 0
    assert "valid dreamfleet" not in done.stdout


def test_min_workers_stand_where_ray_reads_them(cluster: dict[str, Any]) -> None:
    assert "min_workers" not in cluster
    assert sum(kind.get("min_workers", 0) for kind in cluster["available_node_types"].values()) >= 2


def test_head_runs_no_role(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"]["CPU"] == 0


def test_every_start_command_demands_the_token(cluster: dict[str, Any]) -> None:
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [command for command in starts if " start " in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_containers_run_the_pinned_ray(cluster: dict[str, Any], root: Path) -> None:
    pinned = next(
        line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("ray==")
    )
    images = [cluster["docker"]["image"]]
    images += [
        kind["docker"]["worker_image"]
        for kind in cluster["available_node_types"].values()
        if "docker" in kind
    ]
    assert all(f":{pinned.removeprefix('ray==')}-py311" in image for image in images)


def test_exactly_one_worker_type_takes_the_entry_point(cluster: dict[str, Any]) -> None:
    kinds = {name: kind["resources"] for name, kind in cluster["available_node_types"].items()}
    assert [name for name, resources in kinds.items() if "learner_node" in resources] == ["learner"]
    assert cluster["available_node_types"]["learner"]["max_workers"] == 1

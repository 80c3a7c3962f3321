"""A replay over three nodes of a Ray cluster that loses one: sampling goes on, and takes the node back."""

from collections.abc import Iterator

import pytest

from bench.cluster import Table, open_nodes

pytestmark = [pytest.mark.ray, pytest.mark.drill]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, leaves_nothing: None) -> Iterator[Table]:
    folder = tmp_path_factory.mktemp("nodes")
    with open_nodes("ray", folder) as nodes, Table(folder, nodes) as table:
        yield table


def test_a_killed_ray_node_costs_seconds_and_no_uniformity(table: Table) -> None:
    outage = table.lose_node(1)
    assert min(outage.p_before, outage.p_during, outage.p_after, outage.p_shards) > 1e-4, outage
    assert outage.noticed_seconds < 3.0, outage  # promised: see docs/reliability.md
    assert outage.pause_seconds < 3.0, outage

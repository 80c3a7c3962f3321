"""A replay over three node processes: one dies or falls silent, sampling goes on, the node returns."""

from collections.abc import Iterator

import pytest

from bench.cluster import Table, open_nodes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    folder = tmp_path_factory.mktemp("nodes")
    with open_nodes("process", folder) as nodes, Table(folder, nodes) as table:
        yield table


@pytest.mark.parametrize(("index", "silent"), [(1, False), (2, True)], ids=["killed", "silent"])
def test_sampling_goes_on_uniformly_without_a_lost_node_and_with_it_when_it_returns(
    table: Table, index: int, silent: bool
) -> None:
    outage = table.lose_node(index, silent=silent)
    assert min(outage.p_before, outage.p_during, outage.p_after, outage.p_shards) > 1e-4, outage
    assert outage.noticed_seconds < 3.0, outage  # promised: see docs/reliability.md
    assert outage.pause_seconds < 3.0, outage

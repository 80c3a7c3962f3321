"""`dreamfleet replay move`: what a dead shard left belongs to another afterwards."""

from pathlib import Path

from click.testing import CliRunner

from deploy.replay_cli import replay
from replay import synthetic
from replay.shard import ReplayShard
from system.errors import ConfigError, PreflightError
from system.experience import StreamId

TABLE = synthetic.vector_table()


def test_rows_change_their_shard_and_stay_what_they_were(tmp_path: Path) -> None:
    for index, count in ((0, 200), (1, 30)):
        shard = ReplayShard(tmp_path, index, TABLE, capacity_rows=1024, segment_rows=64)
        shard.append([synthetic.rows(TABLE, StreamId(actor=index, env=0), 0, count)], 5.0)
        shard.close()
    runner = CliRunner()
    done = runner.invoke(replay, ["move", str(tmp_path), "--from", "0", "--to", "1"], catch_exceptions=False)
    assert done.output.startswith("200 rows moved")
    found = [ReplayShard(tmp_path, n, TABLE, capacity_rows=1024) for n in range(2)]
    assert [(s.stats().inserted, s.stats().rows) for s in found] == [(200, 0), (30, 230)]
    alive = runner.invoke(replay, ["move", str(tmp_path), "--from", "0", "--to", "1"])
    assert isinstance(alive.exception, PreflightError)
    wrong = runner.invoke(replay, ["move", str(tmp_path), "--from", "0", "--to", "7"])
    assert isinstance(wrong.exception, ConfigError)
    for shard in found:
        shard.close()

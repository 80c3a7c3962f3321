"""How fast batches come out of the replay beside plain memcpy, and how fast rows go in over gRPC.

Batches are 16 x 65 rows of 64x64x3 images, vectors and everything else a row has. Parts:

    memory   sampling at --gigabytes and --more-gigabytes in the page cache, against memcpy in turn with it
    uncached sampling with nothing in the page cache, against reading the files from end to end
    cold     sampling of compressed segments of real Atari frames, against memcpy
    insert   client processes through the real wire into a shard process, acknowledged
    peers    other projects' buffers under the same load, in an environment of their own
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.load import Row

PARTS = ("memory", "uncached", "cold", "insert", "peers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the sampled replay")
    parser.add_argument("--more-gigabytes", type=float, default=8.0, help="a second size; 0: none")
    parser.add_argument("--seconds", type=float, default=10.0, help="measure each figure for about so long")
    parser.add_argument("--clients", type=int, default=2, help="processes that insert at once")
    parser.add_argument("--part", choices=PARTS, action="append", help="only these; default: all")
    parser.add_argument(
        "--root", type=Path, default=None, help="directory for the replay; default: temporary"
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Every figure of the parts asked for, with its ratio to what was measured in the same run."""
    for part in options.part or PARTS:
        yield from _part(part, options)


def _part(part: str, options: argparse.Namespace) -> Iterator[Row]:
    gigabytes, seconds = options.gigabytes, options.seconds
    if part == "memory":
        from bench.replay_sampling import sample_rows

        for size in (gigabytes, options.more_gigabytes):
            if size > 0:
                with _folder(options) as name:
                    yield from sample_rows(Path(name), size, seconds)
    elif part == "uncached":
        from bench.replay_cache import cache_rows

        with _folder(options) as name:
            yield from cache_rows(Path(name), gigabytes, rounds=3)
    elif part == "cold":
        from bench.replay_cold import cold_rows

        with _folder(options) as name:
            yield from cold_rows(Path(name), min(gigabytes, 1.0), seconds)
    elif part == "insert":
        from bench.replay_inserts import TABLES, insert_rows

        for case in TABLES:
            with _folder(options) as name:
                yield from insert_rows(Path(name), case, options.clients, seconds)
    else:
        from bench.replay_peers import peer_rows

        yield from peer_rows(min(gigabytes, 1.0), seconds)


def _folder(options: argparse.Namespace) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bench-replay-", dir=options.root)

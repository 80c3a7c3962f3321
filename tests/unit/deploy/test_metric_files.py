"""Metric records reach the JSON lines and the TensorBoard file; a full disk is one clear error."""

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from deploy.driver import Progress
from deploy.progress import MetricFiles
from system.errors import PreflightError


def board_events(directory: Path) -> list[Event]:
    """Records of the TensorBoard file: length, its checksum, bytes, their checksum."""
    raw = next(directory.glob("events.out.tfevents.*")).read_bytes()
    found, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        found.append(Event.FromString(raw[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return found


def test_records_reach_both_files(tmp_path: Path) -> None:
    files = MetricFiles(tmp_path)
    files.write(Progress(env_steps=120, env_rate=30.0, updates=7, learner={"loss/total": 1.5}))
    files.scalar("eval/return_mean", 99.5, 200)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["env_steps"] for line in lines] == [120, 200]
    assert lines[0]["learner/updates"] == 7
    assert lines[0]["learner/loss/total"] == 1.5
    shown = {
        (event.step, value.tag): value.simple_value
        for event in board_events(tmp_path)
        for value in event.summary.value
    }
    assert shown[120, "learner/loss/total"] == 1.5
    assert shown[200, "eval/return_mean"] == 99.5
    files.close()


def test_records_are_spaced_unless_forced(tmp_path: Path) -> None:
    files = MetricFiles(tmp_path, seconds=3600)
    for steps in (1, 2):
        files.write(Progress(env_steps=steps))
    files.write(Progress(env_steps=3), force=True)
    files.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["env_steps"] for line in lines] == [1, 3]


def test_full_disk_is_a_preflight_error(tmp_path: Path) -> None:
    files = MetricFiles(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(PreflightError, match=r"No space left.*free space there and run the same command"):
        files.scalar("eval/return_mean", 1.0, 1)
    files.close()

"""Log records show their event first and the values after it."""

import logging

from deploy.log_lines import EventFormatter


def line(message: str, **extra: object) -> str:
    record = logging.makeLogRecord({"msg": message, "levelname": "WARNING", "name": "deploy.driver", **extra})
    return EventFormatter("%(levelname)s %(name)s: %(message)s").format(record)


def test_values_follow_the_event() -> None:
    got = line("role lost", role="actor-1", delay=0.2, reason="ended by signal SIGKILL\nlast line")
    assert got == (
        "WARNING deploy.driver: role lost role=actor-1 delay=0.2 reason='ended by signal SIGKILL\\nlast line'"
    )


def test_a_record_without_values_is_its_event() -> None:
    assert line("run ended") == "WARNING deploy.driver: run ended"


def test_long_values_are_cut() -> None:
    assert len(line("x", why="a b" * 1000)) < 500

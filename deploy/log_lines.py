"""How log records look: the event, then its values as key=value. Used by the supervisor and every role."""

from __future__ import annotations

import logging

LONGEST_VALUE = 400
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class EventFormatter(logging.Formatter):
    """Appends what was passed as `extra`, in order, one line per record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Names with an underscore are other libraries' marks: Ray stamps every record once it is imported.
        values = [(k, v) for k, v in vars(record).items() if k not in _OWN and not k.startswith("_")]
        return super().formatMessage(record) + "".join(f" {key}={_shown(value)}" for key, value in values)


def _shown(value: object) -> str:
    text = str(value)
    if text.isprintable() and " " not in text:
        return text
    shown = repr(text)
    return shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}..."


def log_to_stderr(level: int, pattern: str) -> None:
    """Send records of `level` and above to standard error in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter(pattern))
    logging.basicConfig(level=level, handlers=[handler])

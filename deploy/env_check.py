"""`dreamfleet env check`: the actors' conformance kit on any environment a user can name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.conformance import Finding, check_env
from system.config import parse_assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvReport:
    """Findings for one environment; it passed when none is an error."""

    name: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "findings": [asdict(f) for f in self.findings]}

    def text(self) -> str:
        lines = [
            f"{f.level:5} {f.rule}: {f.detail}" + (f"\n      -> {f.remedy}" if f.remedy else "")
            for f in self.findings
        ]
        return "\n".join([*lines, f"{self.name}: {'conforms' if self.passed else 'does not conform'}"])


def check_environment(name: str, assignments: Sequence[str]) -> EnvReport:
    """Raises: ConfigError for an unknown environment or a malformed option."""
    options: dict[str, Any] = {}
    for text in assignments:
        options |= parse_assignment(text)
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 (sys.path holds strings)
        sys.path.insert(0, here)  # a user's module:callable lives where the command is run
    return EnvReport(name=name, findings=check_env(name, options))

"""`python -m bench NAME [--json] [...]`: one JSON object per row on stdout.

Without --json a readable line goes to stderr beside it. Each bench is a module with
add_arguments(parser) and rows(options), imported only when asked for. `all` runs every one in a
process of its own and rewrites the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.load import Row
from system.errors import DreamfleetError, InfrastructureError

TABLED = ("replay", "cluster", "learner", "weights", "collect")
"""Benches that `all` runs."""
ROOT = Path(__file__).resolve().parent.parent
LONGEST_SECONDS = 3600.0


def names() -> list[str]:
    """Every bench there is: modules of this package with a rows(), found without importing them."""
    modules = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in modules if "\ndef rows(" in path.read_text())


def main(arguments: list[str] | None = None) -> int:
    """Run one bench, or all. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    choices = [*names(), "all"]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=choices, metavar="NAME", help=" | ".join(choices))
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON rows")
    parser.add_argument(
        "--save", action="store_true", help="keep the rows in docs/results, rewrite the tables"
    )
    if not arguments or arguments[0] not in choices:
        parser.parse_args(arguments)  # prints help or the error and exits
        return 2
    if arguments[0] == "all":
        parser.parse_args(arguments)
        return _run_all()
    module: Any = importlib.import_module(f"bench.{arguments[0]}")
    module.add_arguments(parser)
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    try:
        for row in module.rows(options):
            _print_row(row, quiet=options.json)
            found.append(row.to_json())
    except DreamfleetError as error:
        print(f"bench {options.name}: {error}", file=sys.stderr)
        return error.exit_code
    if options.save:
        _save(options.name, [a for a in arguments if a not in ("--json", "--save")], found)
    return 0


def _save(name: str, arguments: list[str], rows: list[dict[str, Any]]) -> None:
    from bench import report

    report.RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "command": " ".join(["python -m bench", *arguments]), "rows": rows}
    (report.RESULTS / f"bench-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    report.rewrite()


def _print_row(row: Row, *, quiet: bool) -> None:
    print(json.dumps(row.to_json()), flush=True)
    if not quiet:
        ratio = "" if row.ratio is None else f"  {row.ratio:.3g} x {row.ratio_to}"
        doubt = f"  ! others used {row.foreign_load:.2f} cores" if row.foreign_load > 0.2 else ""
        line = f"  {row.case:<24} {row.metric:<18} {row.value:>12,.4g} {row.unit:<10}{ratio}{doubt}"
        print(line, file=sys.stderr, flush=True)


def _run_all() -> int:
    worst = 0
    for name in TABLED:
        try:
            rows = list(_run_one([sys.executable, "-m", "bench", name, "--json"]))
        except InfrastructureError as error:
            print(f"bench {name}: {error}", file=sys.stderr)
            worst = max(worst, error.exit_code)
        else:
            _save(name, [name], rows)
    return worst


def _run_one(command: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one bench. Raises: InfrastructureError when it fails or takes too long."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(f"it ran for {LONGEST_SECONDS:g} s without ending; run it alone") from error
    if done.returncode != 0:
        raise InfrastructureError(f"it ended with exit code {done.returncode}; run it alone to see why")
    for line in done.stdout.splitlines():
        row = json.loads(line)
        print(line, flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())

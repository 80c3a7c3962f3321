"""Rewrites the generated tables of docs/performance.md from docs/results/*.json. Never typed by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "results"
PERFORMANCE = DOCS / "performance.md"
README = DOCS.parent / "README.md"


def _proof_table(data: dict[str, Any]) -> str:
    rows = data["rows"]
    good = [r for r in rows if "return" in r]
    lines = [
        f"### {data['case']} ({data['bar']})", "", f"`{data['command']}`", "",
        "| seed | evaluation return (std) | random | env steps | updates | wall s | passed |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        if "return" not in r:
            lines.append(f"| {r['seed']} | exit code {r['exit_code']} | | | | {r['wall_seconds']:.0f} | no |")
            continue
        lines.append(
            f"| {r['seed']} | {r['return']:.2f} ({r['std']:.2f}) over {r['episodes']} | {r['random']:.2f} | "
            f"{r['env_steps']} | {r['updates']} | {r['wall_seconds']:.0f} | "
            f"{'yes' if r['passed'] else 'no'} |"
        )
    if len(good) > 1:
        values = [r["return"] for r in good]
        lines += [
            "",
            f"{len(good)} seeds: mean {statistics.fmean(values):.2f}, standard deviation "
            f"{statistics.stdev(values):.2f}, "
            f"median {statistics.median(values):.2f}, worst {min(values):.2f}; "
            f"random {statistics.fmean(r['random'] for r in good):.2f}; "
            f"median wall {statistics.median(r['wall_seconds'] for r in good):.0f} s.",
        ]
    if good and "training_return" in good[0]:
        told = ", ".join(
            "none" if r["training_return"] is None else f"{r['training_return']:.1f}" for r in good
        )
        lines += ["", f"Mean training return of the last 20,000 steps, by seed: {told}."]
    if data.get("note"):
        lines += ["", data["note"]]
    if good and "loss_first" in good[0]:
        lines += [
            "",
            *(
                f"Seed {r['seed']}: reconstruction loss {r['loss_first']:.1f} -> {r['loss_last']:.1f}."
                for r in good
            ),
        ]
    return "\n".join(lines) + "\n"


def _bench_table(name: str, rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        f"### {name}", "", f"`{command}`", "",
        "| case | metric | value | unit | ratio | to | n | spread | foreign load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        ratio = "" if r.get("ratio") is None else f"{r['ratio']:.3g}"
        lines.append(
            f"| {r['case']} | {r['metric']} | {r['value']:.4g} | {r['unit']} | {ratio} | "
            f"{r.get('ratio_to') or ''} | "
            f"{r.get('n', '')} | {r.get('spread') or 0:.2g} | {r.get('foreign_load') or 0:.2f} |"
        )
    return "\n".join(lines) + "\n"


def between(text: str, marker: str, body: str) -> str:
    """The page with `body` between the two comments of `marker`."""
    begin, end = f"<!-- {marker} begin -->", f"<!-- {marker} end -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n\n{body}\n{end}{tail}"


def _summary_row(data: dict[str, Any]) -> str:
    """One line of the README's table of proofs."""
    good = [r for r in data["rows"] if "return" in r]
    values = [r["return"] for r in good] or [float("nan")]
    wall = statistics.median(r["wall_seconds"] for r in good) if good else float("nan")
    chance = statistics.fmean(r["random"] for r in good) if good else float("nan")
    steps = statistics.median(r["env_steps"] for r in good) if good else float("nan")
    return (
        f"| {data['case']} | {len(data['rows'])} | {statistics.median(values):.2f} | {min(values):.2f} | "
        f"{chance:.2f} | {steps:.0f} | {wall:.0f} |"
    )


def rewrite() -> None:
    """Replace what stands between the markers `proofs` and `bench`, and `results` in the README."""
    text = PERFORMANCE.read_text()
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("proof-*.json"))]
    proofs = [_proof_table(data) for data in found]
    benches = []
    for path in sorted(RESULTS.glob("bench-*.json")):
        data = json.loads(path.read_text())
        benches.append(_bench_table(data["name"], data["rows"], data["command"]))
    text = between(text, "proofs", "\n".join(proofs))
    PERFORMANCE.write_text(between(text, "bench", "\n".join(benches)))
    table = [
        "| case | seeds | median evaluation return | worst | random | env steps | median wall s |",
        "|---|---|---|---|---|---|---|",
        *map(_summary_row, found),
        "",
        "Two CPU cores, whole runs from start to summary on a local Ray.",
    ]
    README.write_text(between(README.read_text(), "results", "\n".join(table) + "\n"))


if __name__ == "__main__":
    rewrite()

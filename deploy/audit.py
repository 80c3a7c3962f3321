"""`dreamfleet audit`: are all rows that the replay acknowledged in it, exactly once?

Sets the replay's own books (`replay.audit`) against what every life of every actor counted: the newest word
of roles that run, and the last words of those that ended (`events.jsonl`). A killed actor's last word is up
to a second old, so what it claims is a lower bound; what it made and never had acknowledged may be gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.driver import row_counts
from deploy.run_dir import RunDirectory
from replay.audit import Finding, ReplayBooks, audit_replay

ENDED = ("role lost", "role stopped", "role left behind")
RESTORED = "replay restored"
SHOWN = 12
"""Findings and lives shown as text; JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLife:
    """One incarnation of one actor: what it counted beside what is stored."""

    actor: int
    incarnation: int
    made: int  # rows, by its own count
    acknowledged: int
    stored: int  # rows of it in the replay
    whole: bool  # nothing of it was evicted, so acknowledged <= stored must hold
    stopped: bool  # ended by request: its counts are final


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Made by `audit_run`, shown by the command line."""

    run_dir: str
    inserted: int
    live: int
    evicted: int
    damaged: int  # of evicted: rows that damage took, as the shards noticed and logged
    segments: int
    shards: int
    acknowledged: int
    lost: int  # acknowledged rows that are not stored
    doubled: int
    missing: int
    unsent: int  # rows made and not stored: on their way, or gone with an actor; bounded by the chunk
    lives: tuple[ActorLife, ...]
    findings: tuple[Finding, ...]

    @property
    def balanced(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        return {"balanced": self.balanced, **asdict(self)}

    def text(self) -> str:
        lines = [
            f"{self.run_dir}: {'balanced' if self.balanced else 'DOES NOT BALANCE'}",
            f"  rows         {self.inserted} inserted, {self.live} live, {self.evicted} evicted"
            f"{f' ({self.damaged} of them damaged)' if self.damaged else ''}; {self.segments} segments in "
            f"{self.shards} shards",
            f"  acknowledged {self.acknowledged} by {len(self.lives)} lives of actors; lost {self.lost}, "
            f"doubled {self.doubled}, missing {self.missing}",
            f"  unsent       {self.unsent} rows made, not acknowledged: on their way, or gone with an actor",
            f"  {'actor':>7}{'life':>6}{'made':>10}{'acked':>10}{'stored':>10}  end",
        ]
        lines += [
            f"  {life.actor:>7}{life.incarnation:>6}{life.made:>10}{life.acknowledged:>10}{life.stored:>10}  "
            f"{'stopped' if life.stopped else 'killed or running'}{'' if life.whole else ', partly evicted'}"
            for life in self.lives[-SHOWN:]
        ]
        if len(self.lives) > SHOWN:
            lines.append(f"  {len(self.lives) - SHOWN} earlier lives: --json shows them")
        lines += [f"  {f.kind}: {f.where}: {f.what} ({f.rows} rows)" for f in self.findings[:SHOWN]]
        if len(self.findings) > SHOWN:
            lines.append(f"  {len(self.findings) - SHOWN} more findings: --json shows them")
        return "\n".join(lines)


def audit_run(path: Path) -> Audit:
    """Balance the books of a run, alive or not.

    Raises: ConfigError when `path` is no run; others as `audit_replay`.
    """
    run_dir = RunDirectory(path)
    run_dir.config()
    claims = _claims(run_dir)  # before the rows: what is claimed now must be found then
    books = audit_replay(run_dir.replay)
    lives = tuple(_lives(claims, books))
    findings = (*books.findings, *_unbalanced(lives, books))
    return Audit(
        run_dir=str(run_dir.path),
        inserted=books.inserted,
        live=books.live,
        evicted=books.evicted,
        damaged=books.damaged,
        segments=books.segments,
        shards=books.shards,
        acknowledged=sum(life.acknowledged for life in lives),
        lost=sum(finding.rows for finding in findings if finding.kind == "lost"),
        doubled=books.rows_of("doubled"),
        missing=books.rows_of("missing"),
        unsent=sum(max(0, life.made - life.stored) for life in lives if life.whole and life.made),
        lives=lives,
        findings=findings,
    )


@dataclass(slots=True, kw_only=True)
class _Claim:
    """The greatest counts one life ever reported."""

    counts: dict[str, int]
    stopped: bool = False

    @property
    def acknowledged(self) -> int:
        """A life that stopped on request has sent all it made but what it counts as lost."""
        acknowledged = self.counts.get("acknowledged", 0)
        if not self.stopped or "lost" not in self.counts:
            return acknowledged
        return max(acknowledged, self.counts.get("rows", 0) - self.counts["lost"])

    def take(self, counts: Mapping[str, int], *, stopped: bool) -> None:
        self.counts = {k: max(self.counts.get(k, 0), counts.get(k, 0)) for k in self.counts | dict(counts)}
        self.stopped |= stopped


def _claims(run_dir: RunDirectory) -> dict[tuple[int, int], _Claim]:
    """By (actor, incarnation). Events first: a life in a status file may still go on.

    Lives before an exact resume claim nothing: rows younger than the checkpoint were given up on purpose.
    """
    claims: dict[tuple[int, int], _Claim] = {}
    given_up: dict[str, int] = {}
    for event in run_dir.events():
        if event.get("event") == RESTORED:
            given_up |= event.get("incarnations", {})
        role, _, index = str(event.get("role", "")).rpartition("-")
        if event.get("event") in ENDED and role == "actor":
            claim = claims.setdefault((int(index), int(event["incarnation"])), _Claim(counts={}))
            stopped = event["event"] == "role stopped" or event.get("state") == "stopped"
            claim.take(row_counts(event), stopped=stopped)
    for record in run_dir.role_records():
        if record["role"] == "actor":
            claim = claims.setdefault((int(record["index"]), int(record["incarnation"])), _Claim(counts={}))
            claim.take(row_counts(record.get("payload", {})), stopped=record["state"] == "stopped")
    return {key: claim for key, claim in claims.items() if key[1] > given_up.get(f"actor-{key[0]}", -1)}


def _lives(claims: Mapping[tuple[int, int], _Claim], books: ReplayBooks) -> Iterator[ActorLife]:
    stored: dict[tuple[int, int], int] = {}
    for (stream, incarnation), rows in books.rows.items():
        stored[stream.actor, incarnation] = stored.get((stream.actor, incarnation), 0) + rows
    whole_from: dict[int, int] = {}
    for stream, incarnation in books.whole_from.items():
        whole_from[stream.actor] = max(whole_from.get(stream.actor, 0), incarnation)
    for actor, incarnation in sorted(claims.keys() | stored.keys()):
        claim = claims.get((actor, incarnation), _Claim(counts={}))
        yield ActorLife(
            actor=actor,
            incarnation=incarnation,
            made=claim.counts.get("rows", 0),
            acknowledged=claim.acknowledged,
            stored=stored.get((actor, incarnation), 0),
            whole=incarnation >= whole_from.get(actor, 0),
            stopped=claim.stopped,
        )


def _unbalanced(lives: tuple[ActorLife, ...], books: ReplayBooks) -> Iterator[Finding]:
    """Lives with more rows acknowledged than stored, and actors with more than ever were inserted."""
    for life in lives:
        short = life.acknowledged - life.stored
        if life.whole and short > 0:
            where = f"actor-{life.actor} incarnation {life.incarnation}"
            what = f"{life.acknowledged} rows were acknowledged, {life.stored} are stored"
            yield Finding(kind="lost", where=where, what=what, rows=short)
    for actor in sorted({life.actor for life in lives if not life.whole}):
        claimed = sum(life.acknowledged for life in lives if life.actor == actor)
        inserted = sum(rows for stream, rows in books.positions.items() if stream.actor == actor)
        if claimed > inserted:
            what = f"{claimed} rows were acknowledged, {inserted} were ever inserted"
            yield Finding(kind="lost", where=f"actor-{actor}", what=what, rows=claimed - inserted)

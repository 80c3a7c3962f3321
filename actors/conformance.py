"""The conformance kit: tells whether an environment keeps our contract, and what to do where it does not.

`dreamfleet env check <env>` runs it on yours; our own tests run it on every adapter.
Letters: N environments, n rows of one recv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.envs.catalog import make_env
from actors.envs.checked import check_rows
from actors.envs.faults import EnvFault
from system.errors import DreamfleetError, EnvError, EnvTimeout
from system.experience import Step
from system.interfaces import VectorEnv
from system.seeds import generator
from system.specs import TableSpec

Level = Literal["ok", "warning", "error"]
EnvFactory = Callable[[int], VectorEnv]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule's verdict. Made by check_env; `remedy` is empty when the level is ok."""

    level: Level
    rule: str
    detail: str
    remedy: str = ""


def check_env(
    name_or_factory: str | EnvFactory,
    options: Mapping[str, Any] | None = None,
    *,
    num_envs: int = 3,
    rows: int = 600,
    timeout: float = 30.0,
    max_seconds: float = 60.0,
) -> list[Finding]:
    """Play `rows` random rows per environment and judge every rule; never raises for a bad environment.

    A factory takes num_envs and returns a VectorEnv. Times are seconds; `timeout` bounds one recv,
    `max_seconds` the play of each rule. The environment is built three times.
    """

    def build(number: int) -> VectorEnv:
        if isinstance(name_or_factory, str):
            return make_env(name_or_factory, number, options=options, timeout=timeout)
        return name_or_factory(number)

    opened = _open(build, num_envs)
    if isinstance(opened, Finding):
        return [opened]
    env, findings = opened
    try:
        played = _play(env, 11, rows, timeout, max_seconds)
        findings += _judge(played, env, rows)
        if not any(finding.level == "error" for finding in findings):
            findings += _refusals(env, timeout)
    finally:
        env.close()
    if not any(finding.level == "error" for finding in findings):
        findings.append(_determinism(build, played, num_envs, rows, timeout, max_seconds))
    return findings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Played:
    """Everything one play showed, by environment in order of time."""

    steps: list[Step]
    actions: list[NDArray[np.generic]]  # of each step's rows, [n, A]
    fault: DreamfleetError | None
    seconds: float
    slowest: float  # seconds of the longest recv
    restarts: Mapping[str, int]


def _open(build: EnvFactory, num_envs: int) -> tuple[VectorEnv, list[Finding]] | Finding:
    try:
        env = build(num_envs)
    except DreamfleetError as error:
        return Finding(level="error", rule="builds", detail=str(error), remedy="see the message")
    try:
        TableSpec.of(env.spec)
    except DreamfleetError as error:
        env.close()
        return Finding(level="error", rule="names", detail=str(error), remedy="rename the observations")
    detail = ", ".join(f"{k} {list(v.shape)} {v.dtype} {v.kind}" for k, v in env.spec.obs.items())
    action = env.spec.action
    what = f"discrete {action.classes}" if action.kind == "discrete" else f"continuous [{action.size}]"
    return env, [Finding(level="ok", rule="builds", detail=f"obs: {detail}; action: {what}")]


def _play(env: VectorEnv, seed: int, rows: int, timeout: float, max_seconds: float) -> _Played:
    """Random actions that depend only on (seed, env id, row), so that two plays can be compared."""
    rngs = [generator(seed, "check", i) for i in range(env.num_envs)]
    steps: list[Step] = []
    actions: list[NDArray[np.generic]] = []
    fault: DreamfleetError | None = None
    begin, slowest, count = time.monotonic(), 0.0, 0
    try:
        env.start(seed)
        while count < rows * env.num_envs and time.monotonic() - begin < max_seconds:
            waited = time.monotonic()
            step = env.recv(timeout)
            slowest = max(slowest, time.monotonic() - waited)
            check_rows(step, env.spec.obs, env.num_envs)
            chosen = [env.spec.action.sample(rngs[i], 1) for i in step.env_id]
            action = np.concatenate(chosen) if chosen else env.spec.action.sample(rngs[0], 0)
            action[step.is_last] = 0
            env.send(action[~step.is_last], step.env_id[~step.is_last])
            steps.append(step)
            actions.append(action)
            count += len(step)
    except DreamfleetError as error:
        fault = error
    return _Played(
        steps=steps,
        actions=actions,
        fault=fault,
        seconds=time.monotonic() - begin,
        slowest=slowest,
        restarts=dict(getattr(env, "restarts", {})),
    )


def _judge(played: _Played, env: VectorEnv, rows: int) -> Iterator[Finding]:
    """Verdicts on what was shown."""
    if played.fault is not None:
        yield _fault(played.fault)
        return
    yield Finding(level="ok", rule="rows", detail="names, shapes, dtypes, ranges and rewards as declared")
    yield from _episodes(played, env.num_envs)
    for reason, count in played.restarts.items():
        yield Finding(
            level="warning",
            rule="stable",
            detail=f"rebuilt {count} times ({reason}) during the check",
            remedy="the actor survives this, but each time loses an episode: mend the cause",
        )
    made = sum(len(step) for step in played.steps)
    rate = made / max(played.seconds, 1e-9)
    if made < rows * env.num_envs:
        yield Finding(
            level="warning",
            rule="speed",
            detail=f"only {made} rows in {played.seconds:.0f} s ({rate:.0f}/s)",
            remedy="expect slow collection; more actors, or a lighter environment",
        )
    else:
        yield Finding(
            level="ok", rule="speed", detail=f"{rate:.0f} rows/s, slowest recv {played.slowest * 1e3:.1f} ms"
        )


def _fault(error: DreamfleetError) -> Finding:
    cause = error.__cause__ if isinstance(error.__cause__, EnvFault | EnvTimeout) else error
    if isinstance(cause, EnvTimeout) or (isinstance(cause, EnvFault) and cause.reason == "hang"):
        return Finding(
            level="error",
            rule="answers in time",
            detail=str(error),
            remedy="find what blocks in reset or step; env option vectorization=async survives it",
        )
    rule = cause.reason if isinstance(cause, EnvFault) else "contract"
    remedies = {
        "crash": "run the environment alone with the same actions and mend what it raises",
        "non_finite": "find where NaN or infinity enters the observation or reward",
        "malformed": "make the environment return what its spaces declare, or correct the spaces",
    }
    return Finding(level="error", rule=rule, detail=str(error), remedy=remedies.get(rule, "see the message"))


def _episodes(played: _Played, num_envs: int) -> Iterator[Finding]:
    """Whether every stream is first, ..., last, first, ... and the ends are reported as ends."""
    open_rows = np.full(num_envs, -1)  # [N], rows since is_first, -1 before any
    ended = np.ones(num_envs, np.bool_)  # [N]
    lengths: list[int] = []
    terminals = 0
    abandoned = 0
    for step in played.steps:
        ids = step.env_id
        if (ended[ids] & ~step.is_first).any():
            yield Finding(
                level="error",
                rule="is_first",
                detail=f"env {ids[ended[ids] & ~step.is_first].tolist()} shows no is_first after is_last",
                remedy="show the reset observation with is_first and reward 0",
            )
            return
        abandoned += int((step.is_first & ~ended[ids]).sum())
        open_rows[ids] = np.where(step.is_first, 0, open_rows[ids] + 1)
        lengths += open_rows[ids[step.is_last]].tolist()
        terminals += int(step.is_terminal.sum())
        ended[ids] = step.is_last
    if not lengths:
        yield Finding(
            level="warning",
            rule="episodes",
            detail="no episode ended during the check",
            remedy="give the environment a time limit (env option time_limit) or check more rows",
        )
        return
    detail = f"{len(lengths)} episodes of {min(lengths)}..{max(lengths)} steps, {terminals} terminal"
    yield Finding(level="ok", rule="episodes", detail=f"{detail}, {abandoned} abandoned")


def _refusals(env: VectorEnv, timeout: float) -> Iterator[Finding]:
    """Whether unsound actions are refused before they reach the simulator."""
    spec = env.spec.action
    env.start(13)
    step = env.recv(timeout)
    ids = step.env_id
    good = spec.sample(generator(13, "refusals"), len(ids))
    outside = good.copy()
    outside[0] = np.nan if spec.kind == "continuous" else np.asarray(spec.classes)
    cases = {
        "too few actions": (good[:-1], ids),
        "an unknown env id": (good, np.full_like(ids, env.num_envs)),
        "a wrong dtype": (good.astype(np.float16), ids),
        "a value outside the action space": (outside, ids),
    }
    accepted: list[str] = []
    for case, (action, env_id) in cases.items():
        try:
            env.send(action, env_id)
            accepted.append(case)
        except EnvError:
            continue
    if accepted:
        yield Finding(
            level="error",
            rule="refuses bad actions",
            detail=f"accepted {', '.join(accepted)}",
            remedy="check actions in send with actors.envs.gate.SendGate",
        )
    else:
        yield Finding(level="ok", rule="refuses bad actions", detail=f"{len(cases)} kinds, none accepted")


def _determinism(
    build: EnvFactory, first: _Played, num_envs: int, rows: int, timeout: float, max_seconds: float
) -> Finding:
    """Whether a second build with the same seed and actions shows the same rows."""
    env = build(num_envs)
    try:
        second = _play(env, 11, rows, timeout, max_seconds)
    finally:
        env.close()
    streams, again = _by_env(first, num_envs), _by_env(second, num_envs)
    for i, (a, b) in enumerate(zip(streams, again, strict=True)):
        for row, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                return Finding(
                    level="warning",
                    rule="determinism",
                    detail=f"environment {i} shows another row {row} for the same seed and actions",
                    remedy="draw all randomness from self.np_random; only exact resume needs it",
                )
    return Finding(level="ok", rule="determinism", detail="same seed and actions, same rows")


def _by_env(played: _Played, num_envs: int) -> list[list[bytes]]:
    out: list[list[bytes]] = [[] for _ in range(num_envs)]
    for step in played.steps:
        arrays = [step.reward, step.is_first, step.is_last, step.is_terminal]
        arrays += [step.obs[name] for name in sorted(step.obs)]
        for row, env in enumerate(step.env_id):
            out[int(env)].append(b"".join(array[row].tobytes() for array in arrays))
    return out

"""Backend `ray`: each role runs inside one Ray actor, on this machine or on a cluster.

The only place that says `ray.remote`. Roles are wrapped from outside and know nothing of Ray; an actor
never raises through Ray, it reports its failure like every other word. Services and the learner are placed
on the node of the driver, because the learner maps the shards' files; actors go anywhere. Only
that node needs the run directory: a remote actor needs none (its log is written on its own node).
Neighbours: `deploy.driver`, which relaunches, and `deploy.role_process`, whose loop runs here in a thread.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from deploy.fleet import RoleStatus
from deploy.ray_local import LocalRay, join_ray
from deploy.role_process import Reporter, run
from deploy.roles import RoleSpec
from deploy.run_dir import write_atomic
from system.errors import InfrastructureError, PreflightError

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
"""Longest wait for the roles' answers in one statuses(); an answer usually takes milliseconds."""
EXIT_SECONDS = 10.0
GRACE_SECONDS = 2.0
"""Ray calls an actor dead when it has been told to end; its process then takes some milliseconds."""
LOG_TAIL_BYTES = 4000
LEARNER_CPUS = 0.5
"""What Ray books for a learner: on a CPU it waits for the actors part of the time, on a GPU mostly."""


def role_resources(role: str, config: Mapping[str, Any], gpus: float) -> dict[str, float]:
    """CPUs and GPUs that Ray books for one role, or one learner rank; services are light and book nothing.

    `gpus`: how many Ray knows of where the learner would run; device `auto` takes one if there is one.
    """
    if role == "actor":
        return {"CPU": float(config["actors"]["cpus"])}
    if role == "learner":
        device = str(config["learner"]["device"])
        gpu = device.startswith("cuda") or (device == "auto" and gpus >= 1)
        return {"CPU": LEARNER_CPUS, "GPU": float(gpu)}
    return {}


class RayRole:
    """One role inside a Ray actor: it works in a thread, so that status() answers at once."""

    def __init__(self, spec: str) -> None:
        """`spec`: a RoleSpec as JSON."""
        parsed = RoleSpec.from_json(spec)
        self._log_to(Path(parsed.run_dir) / "logs" / f"{parsed.key}.log")
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._record: dict[str, Any] = {}
        self._spoke = time.monotonic()
        self._reporter = Reporter(parsed, self._keep)
        self._reporter.update(node=ray.get_runtime_context().get_node_id())
        self._reporter.write("starting")
        self._thread = threading.Thread(
            target=run, args=(parsed, self._stop, self._reporter), name=parsed.key, daemon=True
        )
        self._thread.start()

    @staticmethod
    def _log_to(path: Path) -> None:
        """Send everything this process says to the run's log, native code included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
        )

    def _keep(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._record, self._spoke = record, time.monotonic()

    def status(self) -> str:
        """The role's newest record as JSON, with `age`: seconds since it was made."""
        with self._lock:
            record, age = self._record, time.monotonic() - self._spoke
        return json.dumps({**record, "age": age}, default=float)

    def stop(self) -> None:
        """Ask the role to finish its slice and stop; status() tells when it has."""
        self._stop.set()


@dataclass(slots=True, kw_only=True)
class _Life:
    """What the driver's side knows of one launched role."""

    spec: RoleSpec
    actor: Any
    asked: Any = None  # reference to the status call under way
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    heard: float  # monotonic seconds when the record came
    lost: str = ""  # why Ray says the actor is gone

    @property
    def state(self) -> str:
        said = str(self.record.get("state", "starting"))
        return "failed" if self.lost and said not in ("stopped", "failed") else said

    @property
    def ended(self) -> bool:
        return bool(self.lost) or self.state in ("stopped", "failed")


class RayFleet:
    """Launches roles as Ray actors and reads their newest words."""

    def __init__(self, run_dir: Path) -> None:
        """Join the Ray this process already uses, the one RAY_ADDRESS names, or start a local one."""
        self._run_dir = run_dir
        self._lives: dict[str, _Life] = {}
        self._local: LocalRay | None = None
        self._joined = False
        if not ray.is_initialized():
            if os.environ.get("RAY_ADDRESS"):
                join_ray(os.environ["RAY_ADDRESS"])
                self._joined = True
            else:
                self._local = LocalRay()
        self._node = ray.get_runtime_context().get_node_id()
        self._trial = get_current_placement_group()

    # -- launching --------------------------------------------------------------------------------

    def launch(self, spec: RoleSpec) -> None:
        """Start one role. Raises: InfrastructureError when its previous life still runs."""
        old = self._lives.get(spec.key)
        if old is not None and not old.ended:
            raise InfrastructureError(
                f"{spec.key} (pid {old.record.get('pid', 0)}) still runs; stop it before launching it again"
            )
        if old is not None:
            self._end(old)
        actor = ray.remote(RayRole).options(**self._options(spec)).remote(spec.to_json())
        self._lives[spec.key] = _Life(spec=spec, actor=actor, heard=time.monotonic())

    def _options(self, spec: RoleSpec) -> dict[str, Any]:
        booked = self._booked(spec)
        return {
            "num_cpus": booked.get("CPU", 0.0),
            "num_gpus": booked.get("GPU", 0.0),
            "max_restarts": 0,  # the driver relaunches, with a new incarnation
            "max_task_retries": 0,
            "max_concurrency": 4,
            "runtime_env": {"env_vars": self._environment(spec)},
            "scheduling_strategy": self._place(spec),
        }

    def _booked(self, spec: RoleSpec) -> dict[str, float]:
        """What this role books in Ray.

        Raises: PreflightError when the learner needs what this node lacks: Ray would wait for it for ever.
        """
        if self._local:
            return {}  # a local Ray serves this run alone: there is nothing to share
        if self._trial is not None and spec.role != "actor":
            return {}  # the trial's own process booked the learner's share: see Dreamfleet
        here = next(node for node in ray.nodes() if node["NodeID"] == self._node)["Resources"]
        booked = role_resources(spec.role, spec.config, float(here.get("GPU", 0.0)))
        ranks = int(spec.config["learner"]["ranks"])
        for resource in ("CPU", "GPU") if spec.role == "learner" else ():
            needed = ranks * booked[resource]
            if needed > (found := float(here.get(resource, 0.0))):
                raise PreflightError(
                    f"the learner ({ranks} ranks, device {spec.config['learner']['device']}) needs "
                    f"{needed:g} {resource} on the driver's node, and Ray has {found:g} there; start the "
                    "driver on a node that has it, or lower learner.ranks"
                )
        return booked

    def _place(self, spec: RoleSpec) -> Any:
        """Services and learner beside the driver; actors in their bundles of a Tune trial, or anywhere."""
        if spec.role != "actor":
            return NodeAffinitySchedulingStrategy(self._node, soft=False)
        if self._trial is None:
            return "SPREAD"
        bundle = 1 + spec.index % (len(self._trial.bundle_specs) - 1)  # one for the driver, one per actor
        return PlacementGroupSchedulingStrategy(self._trial, placement_group_bundle_index=bundle)

    def _environment(self, spec: RoleSpec) -> dict[str, str]:
        root = str(Path(__file__).resolve().parent.parent)
        learner = spec.role == "learner"
        values = {
            "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(spec.config["learner"]["threads"]) if learner else "1",
        }
        if not learner:
            return values | {"CUDA_VISIBLE_DEVICES": ""}
        if self._trial is not None:
            values["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if self._local or self._trial is not None or ":" in str(spec.config["learner"]["device"]):
            # cuda:N counts the machine's devices; what Ray would assign by itself hides all but one.
            values["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        return values

    # -- watching ---------------------------------------------------------------------------------

    def statuses(self) -> dict[str, RoleStatus]:
        """Newest word of every role; asks all at once and waits at most POLL_SECONDS."""
        self._hear([life for life in self._lives.values() if not life.ended], POLL_SECONDS)
        return {key: self._status(life) for key, life in self._lives.items()}

    def _hear(self, lives: list[_Life], timeout: float) -> None:
        for life in lives:
            if life.asked is None:
                life.asked = life.actor.status.remote()
        # Who has answered before does so in milliseconds; who is still starting is not waited for.
        known = [life.asked for life in lives if life.record]
        if known:
            ray.wait(known, num_returns=len(known), timeout=timeout)
        refs = [life.asked for life in lives]
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        for life in lives:
            if life.asked in ready:
                self._take(life)

    def _take(self, life: _Life) -> None:
        """Take the answer to a status call, or Ray's word that there is nobody to answer."""
        reference, life.asked = life.asked, None
        try:
            life.record = json.loads(ray.get(reference))
            life.heard = time.monotonic()
        except ActorUnavailableError:
            return  # a network hiccup, or death not yet confirmed: the next call tells
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            life.lost = reason.split(" Some common causes include")[0]
            return
        path = self._run_dir / "status" / f"{life.spec.key}.json"
        write_atomic(path, json.dumps(life.record))

    def _status(self, life: _Life) -> RoleStatus:
        record = life.record
        error = str(record.get("error", ""))
        if life.state == "failed" and not error:
            error = f"{life.lost}\n{self._log_tail(life.spec.key)}"
        return RoleStatus(
            state=life.state,
            age=float(record.get("age", 0.0)) + time.monotonic() - life.heard,
            pid=int(record.get("pid", 0)),
            address=str(record.get("address", "")),
            metrics_port=int(record.get("metrics_port", 0)),
            payload=record.get("payload", {}),
            error=error,
            exit_code=int(record.get("exit_code", 1 if life.state == "failed" else 0)),
        )

    def _log_tail(self, key: str) -> str:
        path = self._run_dir / "logs" / f"{key}.log"
        raw = path.read_bytes()[-LOG_TAIL_BYTES:] if path.exists() else b""
        return "\n".join(raw.decode(errors="replace").splitlines()[-12:])

    # -- ending -----------------------------------------------------------------------------------

    def stop(self, key: str, timeout: float) -> RoleStatus:
        """Let the role finish its slice and stop, then end its process; kills it after `timeout` seconds."""
        life = self._lives[key]
        self._stop([life], timeout)
        return self._status(life)

    def _stop(self, lives: list[_Life], timeout: float) -> None:
        running = [life for life in lives if not life.ended]
        for life in running:
            life.actor.stop.remote()
            life.asked = None  # an answer under way may be older than the request
        deadline = time.monotonic() + timeout
        while (left := [life for life in running if not life.ended]) and time.monotonic() < deadline:
            self._hear(left, POLL_SECONDS)
            time.sleep(0.02)
        for life in running:
            self._end(life)

    def kill(self, key: str) -> None:
        self._end(self._lives[key])

    def _end(self, life: _Life) -> None:
        """End the actor's process, whatever the role does; returns when it is gone, as far as can be seen."""
        if life.actor is None:
            return
        ray.kill(life.actor, no_restart=True)
        begun = time.monotonic()
        here = life.record.get("node") == self._node
        while not life.lost and time.monotonic() - begun < EXIT_SECONDS:
            life.asked = life.asked or life.actor.status.remote()
            self._hear([life], POLL_SECONDS)
            if here and time.monotonic() - begun > GRACE_SECONDS:  # stopped, it cannot even be told to end
                _end_process(int(life.record["pid"]), 0.0)
                here = False
        if not life.ended:
            life.lost = f"killed; Ray did not confirm its end within {EXIT_SECONDS:.0f} s"
        if here:
            _end_process(int(life.record["pid"]), GRACE_SECONDS)
        life.actor = life.asked = None

    def close(self) -> None:
        """End every role that still runs, then the local Ray when this fleet started it."""
        if ray.is_initialized():
            self._stop(list(self._lives.values()), EXIT_SECONDS)
            for life in self._lives.values():
                self._end(life)
        if self._local is not None:
            self._local.close()
            self._local = None
        elif self._joined and ray.is_initialized():
            ray.shutdown()  # leaves the cluster; its other users go on
        self._joined = False


def _end_process(pid: int, grace: float) -> None:
    """Kill a role's process of this node that does not end by itself: Ray asks it to, and no more."""
    try:
        process = psutil.Process(pid)
        if not any(word.startswith(f"ray::{RayRole.__name__}") for word in process.cmdline()):
            return  # the number has gone to somebody else
        try:
            process.wait(grace)
        except psutil.TimeoutExpired:
            log.warning("role killed", extra={"pid": pid})
            process.kill()
            process.wait(EXIT_SECONDS)
    except psutil.NoSuchProcess:
        pass

"""The metric catalogue: every series any process exports, declared once, and the door that exports them.

Names are dreamfleet_<role>_<noun>_<unit>; counters end in _total. Each process serves its own
/metrics (loopback unless told otherwise); labels stay bounded: run, role, index, plus the few named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from system.errors import PreflightError

Kind = Literal["counter", "gauge", "histogram"]
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)
VERSIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One declared series."""

    name: str  # without the dreamfleet_ prefix
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = SECONDS


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=name, kind="counter", help=help, labels=labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=name, kind="gauge", help=help, labels=labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...] = SECONDS) -> Metric:
    return Metric(name=name, kind="histogram", help=help, buckets=buckets)


CATALOGUE: tuple[Metric, ...] = (
    # actors
    _counter("actor_env_steps_total", "Rows made by this actor's environments."),
    _counter("actor_rows_acknowledged_total", "Rows the replay acknowledged."),
    _counter("actor_rows_lost_total", "Rows dropped before acknowledgement.", "reason"),
    _counter("actor_home_moves_total", "Times the actor moved to another replay shard."),
    _counter("actor_episodes_total", "Episodes finished."),
    _gauge("actor_episode_return", "Undiscounted return of the newest finished episode."),
    _gauge("actor_episode_length", "Length in steps of the newest finished episode."),
    _counter("actor_env_restarts_total", "Environments rebuilt after a fault.", "reason"),
    _counter("actor_env_seconds_total", "Seconds spent inside environments."),
    _counter("actor_policy_seconds_total", "Seconds spent choosing actions."),
    _counter("actor_append_seconds_total", "Seconds spent waiting for replay acknowledgements."),
    _histogram("actor_policy_lag_versions", "Versions between newest published and used policy.", VERSIONS),
    _gauge("actor_policy_version", "Counter of the policy version in use."),
    _gauge("actor_incarnation", "Incarnation of this actor."),
    # replay
    _counter("replay_rows_inserted_total", "Rows committed to this shard."),
    _counter("replay_rows_duplicate_total", "Rows dropped because their identity was already stored."),
    _counter("replay_rows_rejected_total", "Rows refused.", "reason"),
    _counter("replay_rows_evicted_total", "Rows evicted with their segment."),
    _counter("replay_rows_lost_total", "Acknowledged rows lost to damage."),
    _counter("replay_segments_quarantined_total", "Damaged segments taken out of use.", "reason"),
    _gauge("replay_rows", "Rows that can be sampled."),
    _gauge("replay_bytes", "Bytes on disk."),
    _gauge("replay_segments", "Segments on disk."),
    _counter("replay_segments_skipped_total", "Segments a reader left out.", "reason"),
    _counter("replay_rows_skipped_total", "Rows a reader left out because their checksums fail."),
    _counter("replay_counters_refused_total", "Shared counters that said what cannot be.", "counter"),
    _counter("replay_insert_wait_seconds_total", "Seconds appends waited for the limiter."),
    _histogram("replay_append_seconds", "Time from append call to acknowledgement."),
    # learner
    _gauge("learner_younger_rows", "Rows in replay that the resumed weights had not seen, at the start."),
    _counter("learner_updates_total", "Gradient updates done."),
    _counter("learner_rows_trained_total", "Rows trained on, context excluded."),
    _gauge("learner_train_ratio", "Trained rows per inserted row since prefill."),
    _gauge("learner_train_ratio_target", "Train ratio asked for."),
    _gauge("learner_train_ratio_minute", "Trained rows per inserted row over the last minute."),
    _gauge("learner_ahead_rows", "Inserted rows that collecting is ahead of training; negative: behind."),
    _gauge("learner_tolerance_rows", "Inserted rows that either side may be ahead of the other now."),
    _counter(
        "learner_stall_seconds_total",
        "Seconds that a side waited: the learner for the prefill (prefill) or for actors (learner), actors "
        "for the learner (actors) or for credit on its way (grants).",
        "side",
    ),
    _counter("learner_sample_wait_seconds_total", "Seconds the learner waited for replay (limiter or data)."),
    _histogram("learner_update_seconds", "Time of one update without waiting."),
    _histogram("learner_sample_seconds", "Time to draw and copy one batch."),
    _counter("learner_redrawn_sequences_total", "Sequences gone when they were to be copied; others drawn."),
    _counter("learner_priority_rows_total", "Rows with a priority written back.", "outcome"),
    _counter("learner_nonfinite_total", "Updates skipped because loss or gradient was not finite."),
    _gauge("learner_loss", "Newest loss by part.", "part"),
    _gauge("learner_ranks", "Learner ranks that share every batch."),
    _gauge(
        "learner_rank_wait_seconds",
        "Seconds of the newest update that a rank waited for the others; the slow rank waits least.",
        "rank",
    ),
    _gauge("learner_grad_norm", "Newest gradient norm before clipping."),
    _gauge("learner_health", "Whether the alarm is raised, 1 or 0; docs/health.md names them.", "alarm"),
    _gauge("learner_health_value", "Newest value that the alarm compares with its limit.", "alarm"),
    _gauge(
        "learner_open_loop_error_ratio",
        "Open-loop error of replayed rows over that of copying the last seen row, this many rows ahead.",
        "horizon",
    ),
    _histogram("learner_probe_seconds", "Time of one open-loop probe of the world model."),
    _gauge("learner_policy_version", "Counter of the newest published version."),
    _counter("learner_checkpoints_total", "Checkpoints written."),
    _gauge("learner_checkpoint_unixtime", "When the newest checkpoint was written."),
    _counter("learner_write_back_rows_total", "Overlay rows written back.", "outcome"),
    # parameter server
    _counter("params_publishes_total", "Versions accepted."),
    _counter("params_fetches_total", "Fetches answered.", "outcome"),
    _counter("params_bytes_sent_total", "Weight bytes streamed out."),
    _counter("params_refused_total", "Calls refused.", "reason"),
    _gauge("params_version", "Counter of the newest version held."),
    _histogram("params_fetch_seconds", "Time to stream one version to one client."),
    # driver
    _gauge("driver_actors", "Actors that answered within the last heartbeat.", "state"),
    _counter("driver_restarts_total", "Roles restarted.", "restarted"),
    _gauge("driver_eval_return", "Mean return of the newest evaluation."),
    _gauge("driver_env_steps", "Rows inserted since the run began, over all resumes."),
)

_BY_NAME = {metric.name: metric for metric in CATALOGUE}


class Metrics:
    """The exported series of one process. `metrics["learner_updates_total"].inc()`.

    Raises: KeyError for a name that is not in the catalogue: declare it there first.
    """

    def __init__(self, run: str, role: str, index: int = 0) -> None:
        self.registry = CollectorRegistry()
        self._base = {"run": run, "role": role, "index": str(index)}
        self._made: dict[str, Any] = {}
        self._server: Any = None

    def __getitem__(self, name: str) -> Any:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(_BY_NAME[name])
        return made

    def labels(self, name: str, **labels: str) -> Any:
        """A child of a metric that declares labels beyond run, role and index."""
        metric = _BY_NAME[name]
        if name not in self._made:
            self._made[name] = self._parent(metric)
        return self._made[name].labels(**self._base, **labels)

    def _parent(self, metric: Metric) -> Any:
        names = (*self._base, *metric.labels)
        full = f"dreamfleet_{metric.name}"
        if metric.kind == "counter":
            return Counter(full, metric.help, names, registry=self.registry)
        if metric.kind == "gauge":
            return Gauge(full, metric.help, names, registry=self.registry)
        return Histogram(full, metric.help, names, buckets=metric.buckets, registry=self.registry)

    def _make(self, metric: Metric) -> Any:
        if metric.labels:
            raise KeyError(f"{metric.name} has labels {metric.labels}; use metrics.labels(name, ...)")
        return self._parent(metric).labels(**self._base)

    def value(self, name: str, **labels: str) -> float:
        """Current value, 0 when never touched; for reports and tests."""
        got = self.registry.get_sample_value(f"dreamfleet_{name}", {**self._base, **labels})
        return 0.0 if got is None else float(got)

    def serve(self, port: int = 0, host: str = "127.0.0.1") -> int:
        """Serve /metrics and return the port. Raises: PreflightError when the port is taken."""
        try:
            self._server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise PreflightError(
                f"cannot serve /metrics on {host}:{port} ({error.strerror}); choose a free port or 0 for any"
            ) from error
        del thread
        return int(self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def catalogue_by_role() -> Mapping[str, list[Metric]]:
    """The catalogue grouped by its first word; used by docs and dashboards."""
    groups: dict[str, list[Metric]] = {}
    for metric in CATALOGUE:
        groups.setdefault(metric.name.split("_", 1)[0], []).append(metric)
    return groups

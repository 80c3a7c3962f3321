"""The gRPC parameter server against hostile, absent and restarted peers, with and without TLS."""

import datetime
import ipaddress
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from system.errors import ConfigError, DeadlineError, IntegrityError, PreflightError, RejectedError
from system.metrics import Metrics
from system.params.client import GrpcWeightSink, GrpcWeightSource
from system.params.frames import to_frames
from system.params.server import ParameterServer
from system.params.weights_pb2 import FetchRequest, Frame, Version
from system.params.weights_pb2_grpc import WeightStoreStub
from system.weights import NO_VERSION, PolicyVersion, Weights
from system.wire import Security, call_metadata, error_of, open_channel

TIMEOUT = 20.0
TOKENS = {"learner": "learner-token", "actor": "actor-token"}


def some_weights(counter: int, size: int = 1000) -> Weights:
    return Weights.of(PolicyVersion(1, counter), {"w": np.full(size, counter, np.float32)})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("run", "params")


@pytest.fixture
def server(metrics: Metrics) -> Iterator[ParameterServer]:
    server = ParameterServer("127.0.0.1:0", limit_bytes=1 << 20, metrics=metrics)
    yield server
    server.stop()


def publish_raw(
    server: ParameterServer, frames: list[Frame], role: str = "learner", timeout: float | None = TIMEOUT
):
    """Publish without our client's checks; raises the error the server's answer means."""
    with open_channel(server.address) as channel:
        try:
            return WeightStoreStub(channel).Publish(
                iter(frames), timeout=timeout, metadata=call_metadata(role)
            )
        except grpc.RpcError as error:
            raise error_of(error, "server") from error


@pytest.mark.parametrize("role", ["actor", "driver", ""])
def test_only_the_learner_may_publish(server: ParameterServer, metrics: Metrics, role: str):
    sink = GrpcWeightSink(server.address, role=role)
    with pytest.raises(RejectedError, match="may not publish") as refusal:
        sink.publish(some_weights(1))
    sink.close()
    assert refusal.value.reason == "role"
    assert metrics.value("params_refused_total", reason="role") == 1
    assert server.newest() == NO_VERSION


FRAMES = list(to_frames(some_weights(2, size=100_000)))
HOSTILE = {
    "truncated": FRAMES[:1],
    "frame": [FRAMES[0], Frame(data=b"x")],
    "header": [Frame(header=b"\x00garbage\xff")],
    "oversize": list(to_frames(some_weights(2, size=300_000))),
    "digest": [FRAMES[0], Frame(data=bytes(len(FRAMES[1].data)))],
    "version": list(to_frames(some_weights(1))),
    "nonfinite": list(to_frames(Weights.of(PolicyVersion(1, 2), {"w": np.array([np.nan])}))),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_a_hostile_publish_is_refused_counted_and_changes_nothing(
    server: ParameterServer, metrics: Metrics, reason: str
):
    server.publish(some_weights(1))
    with pytest.raises(RejectedError) as refusal:
        publish_raw(server, HOSTILE[reason])
    assert refusal.value.reason == reason
    assert metrics.value("params_refused_total", reason=reason) == 1
    source = GrpcWeightSource(server.address)
    assert source.latest(NO_VERSION, TIMEOUT).digest == some_weights(1).digest
    source.close()


def test_an_empty_publish_is_refused(server: ParameterServer):
    with pytest.raises(RejectedError) as refusal:
        publish_raw(server, [])
    assert refusal.value.reason == "truncated"


def test_streams_without_a_deadline_are_refused(server: ParameterServer):
    with pytest.raises(RejectedError) as refusal:
        publish_raw(server, FRAMES, timeout=None)
    assert refusal.value.reason == "deadline"
    with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as failed:
        list(WeightStoreStub(channel).Fetch(FetchRequest(newer_than=Version())))
    assert error_of(failed.value, "server").reason == "deadline"  # type: ignore[attr-defined]


def test_raw_bytes_instead_of_messages_do_not_hurt_the_server(server: ParameterServer):
    with open_channel(server.address) as channel:
        path = "/dreamfleet.params.v1.WeightStore/Publish"
        call = channel.stream_unary(path, request_serializer=None, response_deserializer=None)
        with pytest.raises(grpc.RpcError):
            call(iter([b"\xff" * 100]), timeout=TIMEOUT, metadata=call_metadata("learner"))
    server.publish(some_weights(1))
    source = GrpcWeightSource(server.address)
    assert source.latest(NO_VERSION, TIMEOUT) is not None
    source.close()


def test_a_client_refuses_more_bytes_than_it_allows(server: ParameterServer):
    server.publish(some_weights(1))
    source = GrpcWeightSource(server.address, limit_bytes=100)
    with pytest.raises(IntegrityError, match="must be <= 100"):
        source.latest(NO_VERSION, TIMEOUT)
    source.close()


def test_fetches_are_counted_by_outcome(server: ParameterServer, metrics: Metrics):
    source = GrpcWeightSource(server.address)
    server.publish(some_weights(1))
    source.latest(NO_VERSION, TIMEOUT)
    source.latest(PolicyVersion(1, 1), TIMEOUT)
    source.close()
    server.stop()
    assert metrics.value("params_fetches_total", outcome="sent") == 1
    assert metrics.value("params_fetches_total", outcome="unchanged") == 1
    assert metrics.value("params_bytes_sent_total") > 4000
    assert metrics.value("params_version") == 1


def test_an_absent_server_ends_in_a_deadline_that_names_it():
    source = GrpcWeightSource("127.0.0.1:1")
    with pytest.raises(DeadlineError, match=r"127\.0\.0\.1:1"):
        source.latest(NO_VERSION, 0.3)
    sink = GrpcWeightSink("127.0.0.1:1", timeout=0.3)
    with pytest.raises(DeadlineError, match=r"127\.0\.0\.1:1"):
        sink.publish(some_weights(1))
    source.close()
    sink.close()


def test_clients_outlive_a_restart_of_the_server():
    first = ParameterServer("127.0.0.1:0")
    sink, source = GrpcWeightSink(first.address), GrpcWeightSource(first.address)
    sink.publish(some_weights(1))
    assert source.latest(NO_VERSION, TIMEOUT).version == (1, 1)
    first.stop()
    published = threading.Thread(target=sink.publish, args=(some_weights(2),))
    published.start()  # finds nobody and tries again
    second = ParameterServer(first.address)
    published.join(TIMEOUT)
    assert source.latest(PolicyVersion(1, 1), TIMEOUT).version == (1, 2)
    sink.close()
    source.close()
    second.stop()


def test_a_closed_client_stops_waiting():
    source = GrpcWeightSource("127.0.0.1:1")
    threading.Timer(0.2, source.close).start()
    with pytest.raises((DeadlineError, ValueError)):
        source.latest(NO_VERSION, 30.0)


def test_a_taken_port_is_a_clear_error(server: ParameterServer):
    with pytest.raises(PreflightError, match="port must be free"):
        ParameterServer(server.address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:0"])
@pytest.mark.parametrize("security", [Security(), Security(tokens=TOKENS)])
def test_plaintext_is_refused_off_loopback(address: str, security: Security):
    with pytest.raises(ConfigError, match="mutual TLS and role tokens"):
        ParameterServer(address, security=security)


class Authority:
    """A certificate authority that lives for one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        certificate = self._build(self._name, self._key.public_key(), ca=True)
        (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _build(self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, name: str, tokens: dict[str, str]) -> Security:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(subject, key.public_key(), ca=False)
        (self._folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (self._folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Security(
            tokens=tokens,
            certificate=self._folder / f"{name}.pem",
            private_key=self._folder / f"{name}.key",
            authority=self._folder / "ca.pem",
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "fleet")


@pytest.fixture
def secure_server(authority: Authority, metrics: Metrics) -> Iterator[ParameterServer]:
    server = ParameterServer("0.0.0.0:0", security=authority.issue("server", TOKENS), metrics=metrics)
    yield server
    server.stop()


def dial(server: ParameterServer) -> str:
    return f"127.0.0.1:{server.port}"


def test_certificate_and_token_together_open_the_door(authority: Authority, secure_server: ParameterServer):
    learner = authority.issue("learner", {"learner": TOKENS["learner"]})
    actor = authority.issue("actor", {"actor": TOKENS["actor"]})
    sink = GrpcWeightSink(dial(secure_server), security=learner)
    source = GrpcWeightSource(dial(secure_server), security=actor)
    sink.publish(some_weights(1, size=2_000_000))
    assert source.latest(NO_VERSION, TIMEOUT).digest == some_weights(1, size=2_000_000).digest
    sink.close()
    source.close()


@pytest.mark.parametrize("tokens", [{}, {"learner": "guess"}, {"learner": TOKENS["actor"]}])
def test_a_certificate_without_the_roles_token_is_refused_and_counted(
    authority: Authority, secure_server: ParameterServer, metrics: Metrics, tokens: dict[str, str]
):
    sink = GrpcWeightSink(dial(secure_server), security=authority.issue("mallory", tokens))
    with pytest.raises(RejectedError, match="token") as refusal:
        sink.publish(some_weights(1))
    sink.close()
    assert refusal.value.reason == "token"
    assert metrics.value("params_refused_total", reason="token") == 1


def test_an_actor_with_its_own_token_still_may_not_publish(
    authority: Authority, secure_server: ParameterServer
):
    actor = authority.issue("actor", {"actor": TOKENS["actor"]})
    sink = GrpcWeightSink(dial(secure_server), role="actor", security=actor)
    with pytest.raises(RejectedError, match="may not publish"):
        sink.publish(some_weights(1))
    sink.close()


def test_a_token_without_the_fleets_certificate_gets_no_answer(
    authority: Authority, secure_server: ParameterServer, tmp_path: Path
):
    stranger = Authority(tmp_path / "elsewhere").issue("actor", TOKENS)
    fleet = authority.issue("actor", TOKENS)
    for security in (Security(tokens=TOKENS), stranger, replace(stranger, authority=fleet.authority)):
        source = GrpcWeightSource(dial(secure_server), security=security)
        with pytest.raises(DeadlineError, match="same TLS setting"):
            source.latest(NO_VERSION, 0.5)
        source.close()


def test_half_a_tls_configuration_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="set all three or none"):
        Security(certificate=tmp_path / "cert.pem")


def test_an_unreadable_certificate_is_named(tmp_path: Path):
    missing = tmp_path / "nowhere.pem"
    security = Security(tokens=TOKENS, certificate=missing, private_key=missing, authority=missing)
    with pytest.raises(ConfigError, match=r"nowhere\.pem"):
        ParameterServer("127.0.0.1:0", security=security)

"""Objects by key under one URL: the few operations the far tier needs, with retries and deadlines.

s3://bucket/prefix, gs://, az://, file:///directory or memory:///name. Endpoint, region and credentials come
from the environment (AWS_ENDPOINT_URL, AWS_REGION, ...), never from a file of ours. Safe for many threads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import MemoryStore, from_url

from system.errors import ConfigError, InfrastructureError

SCHEMES = ("s3", "gs", "az", "file", "memory")
CONNECT_SECONDS = 5
REQUEST_SECONDS = 30
RETRIES = 5
RETRY_SECONDS = 15
"""Nothing is tried again later than this after the first try."""


class StoreError(InfrastructureError):
    """The object store did not do what was asked, however often it was asked."""


class ObjectStore:
    """One prefix of an object store; keys are relative to it."""

    def __init__(self, url: str, backend: Any) -> None:
        self.url = url
        self._backend = backend

    def get(self, key: str) -> memoryview:
        """A whole object. Raises: FileNotFoundError; StoreError."""
        try:
            return memoryview(obstore.get(self._backend, key).bytes())
        except BaseError as error:
            raise self._failed("read", key, error) from error

    def get_range(self, key: str, start: int, stop: int) -> memoryview:
        """Bytes start .. stop - 1 of an object. Raises: FileNotFoundError; StoreError."""
        try:
            return memoryview(obstore.get_range(self._backend, key, start=start, end=stop))
        except BaseError as error:
            raise self._failed("read", key, error) from error

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite an object. Raises: StoreError."""
        try:
            obstore.put(self._backend, key, data)
        except (BaseError, OSError) as error:
            raise self._failed("write", key, error) from error

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False when it does. Raises: StoreError."""
        try:
            obstore.put(self._backend, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise self._failed("write", key, error) from error
        return True

    def keys(self, prefix: str) -> dict[str, int]:
        """Keys below the directory `prefix` with their sizes. Raises: StoreError."""
        try:
            return {o["path"]: o["size"] for page in obstore.list(self._backend, prefix) for o in page}
        except BaseError as error:
            raise self._failed("list", prefix, error) from error

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, whichever of them exist. Raises: StoreError."""
        for key in keys:
            try:
                obstore.delete(self._backend, key)
            except FileNotFoundError:
                continue
            except BaseError as error:
                raise self._failed("delete", key, error) from error

    def _failed(self, what: str, key: str, error: Exception) -> StoreError:
        first = str(error).strip().splitlines()[0]
        return StoreError(
            f"cannot {what} {self.url}/{key} ({first}); check the URL, the AWS_* environment and the network"
        )


@functools.cache
def open_store(url: str) -> ObjectStore:
    """The store at `url`; one object per URL and process. Raises: ConfigError for a URL that is none."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ConfigError(f"replay.far ({url!r}) must begin with one of {[s + '://' for s in SCHEMES]}")
    if parts.scheme == "memory":
        return ObjectStore(url, MemoryStore())
    options: dict[str, Any] = {}
    if parts.scheme == "file":
        Path(parts.path).mkdir(parents=True, exist_ok=True)
    else:
        plain = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://")
        options = {
            "client_options": {
                "connect_timeout": f"{CONNECT_SECONDS}s",
                "timeout": f"{REQUEST_SECONDS}s",
                "allow_http": plain,
            },
            "retry_config": {
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=4),
                    "base": 2,
                },
            },
        }
    try:
        return ObjectStore(url.rstrip("/"), from_url(url, **options))
    except (BaseError, ValueError) as error:
        raise ConfigError(f"replay.far ({url!r}) cannot be opened: {error}") from error

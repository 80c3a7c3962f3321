from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AppendRequest(_message.Message):
    __slots__ = ("schema", "actor", "env", "rows", "payload", "continues")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_FIELD_NUMBER: _ClassVar[int]
    schema: str
    actor: _containers.RepeatedScalarFieldContainer[int]
    env: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    continues: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, schema: _Optional[str] = ..., actor: _Optional[_Iterable[int]] = ..., env: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ..., continues: _Optional[_Iterable[bool]] = ...) -> None: ...

class AppendReply(_message.Message):
    __slots__ = ("committed", "duplicates")
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    committed: int
    duplicates: int
    def __init__(self, committed: _Optional[int] = ..., duplicates: _Optional[int] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("max_inserted",)
    MAX_INSERTED_FIELD_NUMBER: _ClassVar[int]
    max_inserted: int
    def __init__(self, max_inserted: _Optional[int] = ...) -> None: ...

class GrantReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("index", "inserted", "rows", "nbytes", "segments", "streams", "duplicates", "rejected", "evicted", "waiting", "granted", "wait_seconds", "epoch", "incarnations")
    class IncarnationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    INSERTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    index: int
    inserted: int
    rows: int
    nbytes: int
    segments: int
    streams: int
    duplicates: int
    rejected: int
    evicted: int
    waiting: int
    granted: int
    wait_seconds: float
    epoch: int
    incarnations: _containers.ScalarMap[int, int]
    def __init__(self, index: _Optional[int] = ..., inserted: _Optional[int] = ..., rows: _Optional[int] = ..., nbytes: _Optional[int] = ..., segments: _Optional[int] = ..., streams: _Optional[int] = ..., duplicates: _Optional[int] = ..., rejected: _Optional[int] = ..., evicted: _Optional[int] = ..., waiting: _Optional[int] = ..., granted: _Optional[int] = ..., wait_seconds: _Optional[float] = ..., epoch: _Optional[int] = ..., incarnations: _Optional[_Mapping[int, int]] = ...) -> None: ...

class BoundsRequest(_message.Message):
    __slots__ = ("schema", "shard", "life", "version")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    schema: str
    shard: int
    life: int
    version: int
    def __init__(self, schema: _Optional[str] = ..., shard: _Optional[int] = ..., life: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class BoundsReply(_message.Message):
    __slots__ = ("life", "version", "unchanged", "fragments", "inserted", "waiting", "capacity_rows", "segment_rows")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    INSERTED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_ROWS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    life: int
    version: int
    unchanged: bool
    fragments: bytes
    inserted: int
    waiting: int
    capacity_rows: int
    segment_rows: int
    def __init__(self, life: _Optional[int] = ..., version: _Optional[int] = ..., unchanged: _Optional[bool] = ..., fragments: _Optional[bytes] = ..., inserted: _Optional[int] = ..., waiting: _Optional[int] = ..., capacity_rows: _Optional[int] = ..., segment_rows: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("life", "origin", "stream", "start", "count")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    life: int
    origin: _containers.RepeatedScalarFieldContainer[int]
    stream: _containers.RepeatedScalarFieldContainer[int]
    start: _containers.RepeatedScalarFieldContainer[int]
    count: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, life: _Optional[int] = ..., origin: _Optional[_Iterable[int]] = ..., stream: _Optional[_Iterable[int]] = ..., start: _Optional[_Iterable[int]] = ..., count: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("rows", "payload")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    def __init__(self, rows: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class FlagsRequest(_message.Message):
    __slots__ = ("life", "origin", "stream", "start", "count")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    life: int
    origin: int
    stream: int
    start: int
    count: int
    def __init__(self, life: _Optional[int] = ..., origin: _Optional[int] = ..., stream: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class FlagsReply(_message.Message):
    __slots__ = ("found", "is_first")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    IS_FIRST_FIELD_NUMBER: _ClassVar[int]
    found: bool
    is_first: bytes
    def __init__(self, found: _Optional[bool] = ..., is_first: _Optional[bytes] = ...) -> None: ...

class WriteBackRequest(_message.Message):
    __slots__ = ("life", "patches")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    life: int
    patches: _containers.RepeatedCompositeFieldContainer[OverlayRows]
    def __init__(self, life: _Optional[int] = ..., patches: _Optional[_Iterable[_Union[OverlayRows, _Mapping]]] = ...) -> None: ...

class OverlayRows(_message.Message):
    __slots__ = ("origin", "stream", "start", "column", "data")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    origin: int
    stream: int
    start: int
    column: str
    data: bytes
    def __init__(self, origin: _Optional[int] = ..., stream: _Optional[int] = ..., start: _Optional[int] = ..., column: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteBackReply(_message.Message):
    __slots__ = ("written",)
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    written: int
    def __init__(self, written: _Optional[int] = ...) -> None: ...

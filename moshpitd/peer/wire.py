"""Messages <-> protobuf. Nothing of protobuf passes this door inwards, nothing unchecked either.

The dataclasses of `averaging.messages` and the messages of peer.proto have the same names and fields, so one rule
translates them all; what it adds are the checks that a wire needs: ids and digests have their length, numbers are
finite, sequences are bounded. Every violation is a RemoteProtocolError.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from moshpitd.averaging import messages
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Address, Chunk, Message, Record
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank
from moshpitd.peer.v1 import peer_pb2

REPEATED_MAX = 1 << 17
TEXT_MAX = 1024
BYTES_MAX = 64
"""Digests, tokens, keys and signatures; nothing else travels as bytes but payloads."""
NUMBER_MAX = 1 << 62
"""What counts averagings or bytes: far beyond anything real, and one more of it still fits every field."""
HEAD_BYTES_MAX = 1 << 14
"""Of a chunk's frame before its payload: the contributors of the largest group. The whole frame is kept with it."""
_PEER_ID = re.compile(r"[0-9a-f]{64}")

_Frame = typing.TypeVar("_Frame", peer_pb2.ConverseRequest, peer_pb2.ConverseResponse, peer_pb2.TransferRequest)

_WRAPPED: dict[type, str] = {
    getattr(messages, type(getattr(peer_pb2.Envelope(), field.name)).__name__): field.name
    for field in peer_pb2.Envelope.DESCRIPTOR.oneofs_by_name["message"].fields
}
"""Each message's field in an envelope."""
_TYPES: dict[str, type] = {field: kind for kind, field in _WRAPPED.items()}


def envelope(session: Key, message: Message) -> peer_pb2.Envelope:
    """A message, addressed to the session."""
    wrapped = peer_pb2.Envelope(session=session)
    inner = getattr(wrapped, _WRAPPED[type(message)])
    inner.SetInParent()
    _fill(inner, message)
    return wrapped


def opened(wrapped: peer_pb2.Envelope) -> tuple[Key, Message]:
    """The session and the message. Raises RemoteProtocolError."""
    field = wrapped.WhichOneof("message")
    if field is None:
        raise RemoteProtocolError("an envelope without a message, or with one this version does not know")
    message = _read(getattr(wrapped, field), _TYPES[field])
    return Key(_sized(wrapped.session, 20)), typing.cast(Message, message)


def frame_from(kind: type[_Frame], raw: bytes) -> _Frame:
    """A frame of a conversation, or the opening of a transfer. Raises RemoteProtocolError."""
    try:
        return kind.FromString(raw)
    except DecodeError as wrong:
        raise RemoteProtocolError(f"a {kind.__name__} that is no protobuf: {wrong}") from wrong


def record_bytes(record: Record) -> bytes:
    """What is announced, as bytes."""
    proto = peer_pb2.Lease() if isinstance(record, messages.Lease) else peer_pb2.Presence()
    _fill(proto, record)
    return proto.SerializeToString(deterministic=True)


def record_kind(record: Record) -> str:
    return "lease" if isinstance(record, messages.Lease) else "presence"


def record_from(kind: str, body: bytes) -> Record:
    """What was announced. Raises RemoteProtocolError."""
    try:
        match kind:
            case "lease":
                return typing.cast(Record, _read(peer_pb2.Lease.FromString(body), messages.Lease))
            case "presence":
                return typing.cast(Record, _read(peer_pb2.Presence.FromString(body), messages.Presence))
            case _:
                raise RemoteProtocolError(f"a record of unknown kind {kind!r}")
    except DecodeError as wrong:
        raise RemoteProtocolError(f"a {kind} that is no protobuf: {wrong}") from wrong


# ---- the one rule


def _fill(proto: Proto, value: object) -> None:
    kind: Any = type(value)
    for field in _fields(kind):
        item = getattr(value, field.name)
        if isinstance(item, tuple):
            if field.item_is_message:
                for element in item:
                    _fill(getattr(proto, field.name).add(), element)
            else:
                getattr(proto, field.name).extend(item)
        elif dataclasses.is_dataclass(item):
            getattr(proto, field.name).SetInParent()
            _fill(getattr(proto, field.name), item)
        else:
            setattr(proto, field.name, item)


def _read(proto: Proto, kind: type) -> object:
    return kind(**{field.name: field.read(getattr(proto, field.name)) for field in _fields(kind)})


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """How one field is read and checked."""

    name: str
    read: Callable[[Any], object]  # protobuf's own values have no common type
    item_is_message: bool


@functools.cache
def _fields(kind: Any) -> tuple[Field, ...]:  # a dataclass; typeshed has no name for "a class" that hashes
    hints = typing.get_type_hints(kind)
    return tuple(_field(field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _field(name: str, hint: object) -> Field:
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        read_item = _reader(item)

        def read_all(values: Any) -> object:
            if len(values) > REPEATED_MAX:
                raise RemoteProtocolError(f"{name} with {len(values)} entries")
            return tuple(read_item(value) for value in values)

        return Field(name, read_all, isinstance(item, type) and dataclasses.is_dataclass(item))
    return Field(name, _reader(hint), False)


def _reader(hint: object) -> Callable[[Any], object]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return lambda proto: _read(proto, hint)
    if hint is PeerId:
        return _peer
    if hint is GroupId:
        return lambda value: _sized(value, 16)
    if hint is Key:
        return lambda value: _sized(value, 20)
    if hint is float:
        return _finite
    if hint is str or hint is Address:
        return _text
    if hint is int:
        return _number
    if hint is bytes:
        return _short
    if hint in (bool, Incarnation, Rank):
        return _as_is
    raise AssertionError(f"no rule for {hint}")


def _as_is(value: object) -> object:
    return value


def _number(value: int) -> int:
    if abs(value) > NUMBER_MAX:
        raise RemoteProtocolError(f"the number {value}")
    return value


def _short(value: bytes) -> bytes:
    if len(value) > BYTES_MAX:
        raise RemoteProtocolError(f"{len(value)} bytes where at most {BYTES_MAX} belong")
    return value


def _peer(value: str) -> str:
    if not _PEER_ID.fullmatch(value):
        raise RemoteProtocolError("a peer id that is none")
    return value


def _sized(value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise RemoteProtocolError(f"{len(value)} bytes where {size} belong")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise RemoteProtocolError("a number that is not finite")
    return value


def _text(value: str) -> str:
    return value if len(value) <= TEXT_MAX else value[:TEXT_MAX]


# ---- chunks: written and read by hand, byte for byte what the generated code would


_PAYLOAD_TAG = b"\x7a"
_CHUNK_TAG = b"\x12"


def chunk_frame(header: Chunk, payload: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
    """A TransferRequest or TransferResponse with this chunk (both have it in field 2): its head and its payload, which
    follow each other. What copies, copies; what need not, sends them one after the other."""
    head = peer_pb2.Chunk(
        index=header.index,
        view=header.view,
        is_average=header.is_average,
        decoded=header.decoded,
        contributors=header.contributors,
        made_in=header.made_in,
    ).SerializeToString()
    if payload:
        head += _PAYLOAD_TAG + _varint(len(payload))
    return _CHUNK_TAG + _varint(len(head) + len(payload)) + head, payload


def chunk_from(frame: bytes | memoryview) -> Chunk:
    """The chunk of a frame; its payload is a view of the frame. Raises RemoteProtocolError."""
    view = memoryview(frame)
    try:
        tag, at = _read_varint(view, 0)
        length, at = _read_varint(view, at)
        if tag != 0x12 or at + length != len(view):
            raise RemoteProtocolError("a frame that is not one chunk")
        field_at, payload_at = _payload_bounds(view, at)
        if field_at - at > HEAD_BYTES_MAX:
            raise RemoteProtocolError(f"a chunk with {field_at - at} bytes before its payload")
        head = peer_pb2.Chunk.FromString(bytes(view[at:field_at]))
    except (DecodeError, IndexError) as wrong:
        raise RemoteProtocolError(f"a chunk that is no protobuf: {wrong}") from wrong
    if head.view > REPEATED_MAX:
        raise RemoteProtocolError("a chunk with impossible numbers")
    return Chunk(
        head.index,
        head.view,
        view[payload_at:],
        head.is_average,
        head.decoded,
        tuple(Rank(rank) for rank in head.contributors),
        head.made_in,
    )


def _payload_bounds(view: memoryview, at: int) -> tuple[int, int]:
    """Where the payload's field begins and where its bytes do; it must be the last field."""
    end = len(view)
    while at < end:
        field_at = at
        tag, at = _read_varint(view, at)
        if tag == 0x7A:
            length, at = _read_varint(view, at)
            if at + length != end:
                raise RemoteProtocolError("a chunk whose payload is not its last field")
            return field_at, at
        match tag & 7:
            case 0:
                _, at = _read_varint(view, at)
            case 2:
                length, at = _read_varint(view, at)
                at += length
            case _:
                raise RemoteProtocolError("a chunk with an unknown field")
    return end, end


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise RemoteProtocolError("a number that does not end")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

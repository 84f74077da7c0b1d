"""Nonsense made of sense: true messages and frames, changed in any field or in any byte.

Knows protobuf and hypothesis. Does not know sessions or sockets. A change is two numbers, `place` and `value`, read
modulo what there is, so that any list of numbers is a change to any message and hypothesis can make it smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as Proto
from hypothesis import strategies as st

from moshpitd.peer.v1 import peer_pb2

INTEGERS = (0, 1, 2, 3, -1, 7, 63, 64, 4095, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63,
            (1 << 64) - 1)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e30, 1e33, 1.7e308, -1.7e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "x", "0" * 64, "f" * 64, "A" * 64, "127.0.0.1:9", "unix:/nowhere", "a\0b", "4096x4096x4096", "w" * 3000)
BYTES = (b"", b"x", bytes(8), bytes(16), bytes(20), b"\xff" * 20, bytes(32), bytes(64), bytes(65), bytes(3000))
SIZES = (0, 1, 2, 17, 300, 70_000)
_INTEGER_RANGE = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}

Changes = Sequence[tuple[int, int]]
changes: st.SearchStrategy[list[tuple[int, int]]] = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=4
)
noise = st.binary(max_size=200)


@dataclasses.dataclass
class Overheard:
    """Values that were seen in true messages, by field name: keys, ids, tokens."""

    values: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def listen(self, proto: Proto) -> None:
        for inner, field in _places(proto):
            if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                here = getattr(inner, field.name)
                seen = self.values.setdefault(field.name, [])
                for value in here if field.is_repeated else [here]:
                    if value not in seen and len(seen) < 16:
                        seen.append(value)


def _places(proto: Proto) -> list[tuple[Proto, FieldDescriptor]]:
    """Every field of the message and of those inside it."""
    return list(_walk(proto, 4))


def _walk(proto: Proto, depth: int) -> Iterator[tuple[Proto, FieldDescriptor]]:
    for field in proto.DESCRIPTOR.fields:
        yield proto, field
        if field.message_type is None or depth == 0:
            continue
        if field.is_repeated:
            for inner in list(getattr(proto, field.name))[:3]:
                yield from _walk(inner, depth - 1)
        elif proto.HasField(field.name):
            yield from _walk(getattr(proto, field.name), depth - 1)


def change(proto: Proto, how: Changes, overheard: Overheard) -> None:
    """Change the message in place."""
    for place, value in how:
        places = _places(proto)
        inner, field = places[place % len(places)]
        if field.message_type is None:
            _change_value(inner, field, value, overheard)
        elif field.is_repeated:
            _change_length(getattr(inner, field.name), value, None)
        elif value % 2:
            inner.ClearField(field.name)
        else:
            getattr(inner, field.name).SetInParent()


def _change_value(inner: Proto, field: FieldDescriptor, value: int, overheard: Overheard) -> None:
    if field.is_repeated:
        _change_length(getattr(inner, field.name), value, _scalar(field, value // len(SIZES), 0, overheard))
    else:
        setattr(inner, field.name, _scalar(field, value, getattr(inner, field.name), overheard))


def _scalar(field: FieldDescriptor, value: int, now: Any, overheard: Overheard) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            chosen = FLOATS[value % len(FLOATS)]
            return chosen if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE else max(-3e38, min(3e38, chosen))
        case FieldDescriptor.CPPTYPE_BOOL:
            return bool(value % 2)
        case FieldDescriptor.CPPTYPE_STRING:
            fixed: tuple[Any, ...] = BYTES if field.type == FieldDescriptor.TYPE_BYTES else TEXTS
            pool = (*overheard.values.get(field.name, ()), *fixed)
            return pool[value % len(pool)]
        case kind:
            least, most = _INTEGER_RANGE[kind]
            pool = (now + 1, now - 1, *INTEGERS)
            return max(least, min(most, pool[value % len(pool)]))


def _change_length(repeated: Any, value: int, item: Any) -> None:
    """Empty, turned around, doubled, cut, or stretched to a size."""
    now = list(repeated)
    size = SIZES[value % len(SIZES)]
    match value // len(SIZES) % 4:
        case 0 if now and item is None:
            new = (now * (size // len(now) + 1))[:size]
        case 0:
            new = [] if item is None else [item] * size
        case 1:
            new = now[::-1]
        case 2:
            new = now + now
        case _:
            new = now[:-1]
    copies = [type(one).FromString(one.SerializeToString()) if isinstance(one, Proto) else one for one in new]
    del repeated[:]
    repeated.extend(copies)


def damage(raw: bytes, how: Changes) -> bytes:
    """Change bytes: flip, cut, put in, append a field nobody knows."""
    out = bytearray(raw)
    for place, value in how:
        at = place % (len(out) + 1)
        match value % 4:
            case 0 if at < len(out):
                out[at] = value % 256
            case 1:
                del out[at:]
            case 2:
                out[at:at] = bytes([value % 256]) * (1 + place % 9)
            case _:
                out += b"\xfa\x3f\x03abc"
    return bytes(out)


def every_message() -> list[peer_pb2.Envelope]:
    """One of each kind, empty."""
    made: list[peer_pb2.Envelope] = []
    for field in peer_pb2.Envelope.DESCRIPTOR.oneofs_by_name["message"].fields:
        envelope = peer_pb2.Envelope()
        getattr(envelope, field.name).SetInParent()
        made.append(envelope)
    return made

"""What goes over the wire comes back as it was, and nothing that does not belong there gets through."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import string
import typing
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moshpitd.averaging import messages
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Address, Chunk, Message, Record
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank
from moshpitd.peer import wire
from moshpitd.peer.v1 import peer_pb2

MESSAGES: tuple[type, ...] = typing.get_args(messages.Message)
RECORDS: tuple[type, ...] = typing.get_args(messages.Record)
SESSION = Key(b"s" * 20)

peer_ids = st.binary(min_size=32, max_size=32).map(bytes.hex).map(PeerId)
SIGNED = st.integers(-(2**31), 2**31 - 1)
COUNTS = st.integers(0, 2**31 - 1)
BY_HINT: dict[object, st.SearchStrategy[object]] = {
    PeerId: peer_ids,
    GroupId: st.binary(min_size=16, max_size=16),
    Key: st.binary(min_size=20, max_size=20),
    Incarnation: st.integers(0, 2**64 - 1),
    Rank: st.integers(0, 2**16),
    Address: st.text(string.ascii_letters + ":.[]", max_size=60),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=40),
    str: st.text(max_size=wire.TEXT_MAX),
    int: COUNTS,
}


def values(kind: type) -> st.SearchStrategy[object]:
    """Any value of a message's dataclass."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: of_hint(hints[field.name], field.name) for field in dataclasses.fields(kind)})


def of_hint(hint: object, name: str) -> st.SearchStrategy[object]:
    match name:
        case "last_k":
            return SIGNED
        case "views":
            return st.lists(SIGNED, max_size=6).map(tuple)
        case "up_bytes_s" | "down_bytes_s" | "open_s":  # rough numbers travel in half the bytes
            return st.floats(allow_nan=False, allow_infinity=False, width=32)
    if typing.get_origin(hint) is tuple:
        return st.lists(of_hint(typing.get_args(hint)[0], ""), max_size=6).map(tuple)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return values(hint)
    return BY_HINT[hint]


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_message_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    message = typing.cast(Message, data.draw(values(kind)))
    sent = wire.envelope(SESSION, message).SerializeToString()
    assert wire.opened(peer_pb2.Envelope.FromString(sent)) == (SESSION, message)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_record_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    record = typing.cast(Record, data.draw(values(kind)))
    assert wire.record_from(wire.record_kind(record), wire.record_bytes(record)) == record


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=300), kind=st.sampled_from(["lease", "presence", "other"]))
def test_a_record_of_random_bytes_is_refused_or_read_never_a_crash(body: bytes, kind: str) -> None:
    with contextlib.suppress(RemoteProtocolError):
        wire.record_from(kind, body)


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=300))
def test_an_envelope_of_random_bytes_is_refused_or_read_never_a_crash(body: bytes) -> None:
    try:
        envelope = peer_pb2.Envelope.FromString(body)
    except DecodeError:  # gRPC drops what is no protobuf before anybody sees it
        return
    with contextlib.suppress(RemoteProtocolError):
        wire.opened(envelope)


ME = PeerId("0" * 64)
MEMBER = messages.Member(ME, Incarnation(1), 0, 1.0, Address("h:1"), True)
JOIN = messages.Join(Key(b"k" * 20), 1, b"p" * 8, 0, 0, 1, MEMBER, (0,), 1.0, (), False)


def join(change: Callable[[peer_pb2.Envelope], object]) -> peer_pb2.Envelope:
    envelope = wire.envelope(SESSION, JOIN)
    change(envelope)
    return envelope


HOSTILE: dict[str, Callable[[peer_pb2.Envelope], object]] = {
    "no message": lambda e: e.ClearField("join"),
    "a session of 19 bytes": lambda e: setattr(e, "session", b"s" * 19),
    "no session": lambda e: e.ClearField("session"),
    "a key of 21 bytes": lambda e: setattr(e.join, "key", b"k" * 21),
    "a weight that is not a number": lambda e: setattr(e.join.applicant, "weight", math.nan),
    "an infinite weight": lambda e: setattr(e.join.applicant, "weight", math.inf),
    "an endless wait": lambda e: setattr(e.join, "wait_s", math.inf),
    "no applicant": lambda e: e.join.ClearField("applicant"),
    "a peer id in capitals": lambda e: setattr(e.join.applicant, "peer", "A" * 64),
    "a peer id with a line break": lambda e: setattr(e.join.applicant, "peer", "0" * 64 + "\n"),
    "a short peer id": lambda e: setattr(e.join.applicant, "peer", "0" * 63),
    "too many unreachable": lambda e: e.join.unreachable.extend(["0" * 64] * (wire.REPEATED_MAX + 1)),
    "a wrong one among the unreachable": lambda e: e.join.unreachable.append("x"),
    "too long a cell": lambda e: e.join.cell.extend([0] * (wire.REPEATED_MAX + 1)),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_does_not_belong_on_the_wire_is_refused(change: Callable[[peer_pb2.Envelope], object]) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.opened(join(change))


def test_a_message_of_a_later_version_is_refused_in_words() -> None:
    later = peer_pb2.Envelope(session=SESSION).SerializeToString() + b"\xfa\x3f\x00"  # field 1023
    with pytest.raises(RemoteProtocolError, match="this version does not know"):
        wire.opened(peer_pb2.Envelope.FromString(later))


def test_endless_text_is_cut_to_what_a_person_reads() -> None:
    envelope = wire.envelope(SESSION, messages.Suspect(GroupId(b"g" * 16), 0, Rank(1), "w" * 100_000))
    _, message = wire.opened(envelope)
    assert isinstance(message, messages.Suspect) and len(message.why) == wire.TEXT_MAX


# ---- chunks are framed by hand; the generated code is the measure

headers = st.fixed_dictionaries(
    {
        "index": COUNTS,
        "view": st.integers(0, 64),
        "is_average": st.booleans(),
        "decoded": st.booleans(),
        "contributors": st.lists(st.integers(0, 5000), max_size=20),
        "made_in": st.integers(0, 64),
    }
)
payloads = st.one_of(
    st.binary(max_size=300), st.sampled_from([126, 127, 128, 16_383, 16_384, 16_385, 1 << 20]).map(bytes)
)


@settings(max_examples=200, deadline=None)
@given(header=headers, payload=payloads, frame=st.sampled_from([peer_pb2.TransferRequest, peer_pb2.TransferResponse]))
def test_a_frame_made_by_hand_is_the_generated_codes(
    header: dict[str, typing.Any], payload: bytes, frame: type[peer_pb2.TransferRequest | peer_pb2.TransferResponse]
) -> None:
    chunk = Chunk(**{**header, "contributors": tuple(header["contributors"])}, payload=b"")
    generated = frame(chunk=peer_pb2.Chunk(payload=payload, **header))
    made = b"".join(wire.chunk_frame(chunk, payload))
    assert frame.FromString(made) == generated
    assert made == generated.SerializeToString(deterministic=True)
    read = wire.chunk_from(generated.SerializeToString())
    assert bytes(read.payload) == payload
    assert dataclasses.replace(read, payload=b"") == chunk


@settings(max_examples=500, deadline=None)
@given(header=headers, payload=st.binary(max_size=60), data=st.data())
def test_a_damaged_frame_is_refused_or_read_never_a_crash(
    header: dict[str, typing.Any], payload: bytes, data: st.DataObject
) -> None:
    frame = bytearray(peer_pb2.TransferRequest(chunk=peer_pb2.Chunk(payload=payload, **header)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "grow"])):
            case "flip":
                frame[place] = data.draw(st.integers(0, 255))
            case "cut" if place:
                del frame[place:]
            case _:
                frame[place:place] = data.draw(st.binary(max_size=12))
    with contextlib.suppress(RemoteProtocolError):
        wire.chunk_from(bytes(frame))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x12",
        b"\x12\x00\x00",
        b"\x0a\x00",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x12\x04\x7a\x01x\x08",
        b"\x12\x02\x0d\x00",
        b"".join(wire.chunk_frame(Chunk(0, 1 << 20, b"", is_average=False), b"")),
        peer_pb2.TransferRequest(
            chunk=peer_pb2.Chunk(contributors=[0] * (wire.HEAD_BYTES_MAX + 1))
        ).SerializeToString(),
    ],
    ids=["empty", "cut", "a byte too many", "an opening", "endless", "payload not last", "unknown", "view", "crowd"],
)  # fmt: skip
def test_frames_that_are_no_chunk_are_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.chunk_from(frame)

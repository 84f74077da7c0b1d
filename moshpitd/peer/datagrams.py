"""What lossy rounds put into datagrams: a header, at most 1,400 bytes that can be decoded alone, and a truncated MAC.

    first byte   u8      0xD7: the daemon's one UDP socket tells by it who gets a datagram
    kind         u8      contribution, average, hello, mark, report
    codec        u8      of the digest of the codec's name
    sender       u8      rank
    round        8 bytes of a digest of the group's token: who does not know the token cannot name the round
    span         u16     rank whose span it is
    size         u16     bytes of payload
    count        u32     packets of the sender in this span and kind
    sequence     u32     0 to count - 1; of hellos, marks and reports a number that never comes twice
    offset       u64     the first element
    checksum     u32     XXH3 of the payload, of which the lower half: what is damaged costs no cryptography
    payload
    MAC          8 bytes of AES-GMAC over all before it, under a key of the round and the sender

all little-endian. Packed and read by hand, many at a time: this is the daemon's hottest loop. Keys come from the
group's token, which its members were told over gRPC. A nonce is kind, sender, span and sequence: one token, one round;
what is sent twice under one nonce (an average, to all) is the same. Knows bytes. Does not know sockets or rounds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from xxhash import xxh3_64_intdigest

from moshpitd.averaging.lossy_reduce import Phase
from moshpitd.averaging.ranges import PAYLOAD_BYTES_MAX

FIRST_BYTE = 0xD7
STREAM = struct.Struct("<BBBB8sHHI")
"""What all packets of a stream share."""
PLACE = struct.Struct("<IQI")
"""Sequence, offset, checksum."""
HEADER_BYTES = STREAM.size + PLACE.size
MAC_BYTES = 8
DATAGRAM_BYTES_MAX = HEADER_BYTES + PAYLOAD_BYTES_MAX + MAC_BYTES
ROUND_BYTES = 8

Frames = npt.NDArray[np.uint8]
"""Datagrams of equal size, one a row."""
Integers = npt.NDArray[np.intp]


class Kind(IntEnum):
    """What a datagram is."""

    CONTRIBUTION = Phase.CONTRIBUTION
    AVERAGE = Phase.AVERAGE
    HELLO = 2
    """I have this group open. As long as the longest packet: a path that carries it carries all."""
    MARK = 3
    """So many packets I have sent you so far; these phases are over."""
    REPORT = 4
    """In answer: so many of them I have."""


CONTROL = frozenset({Kind.HELLO, Kind.MARK, Kind.REPORT})


@dataclass(frozen=True, slots=True)
class Stream:
    """The part of a header that all packets of a stream share."""

    kind: Kind
    codec: int
    sender: int
    round_id: bytes
    span: int
    size: int
    count: int

    def packed(self) -> bytes:
        return STREAM.pack(
            FIRST_BYTE, self.kind, self.codec, self.sender, self.round_id, self.span, self.size, self.count
        )


@dataclass(slots=True)
class Refusals:
    """Datagrams that were dropped before any work, by what was wrong with them."""

    malformed: int = 0
    """Too short, too long, truncated, of no known kind."""
    unknown: int = 0
    """Of no round that is open here: late ones, and a stranger's."""
    repeated: int = 0
    """They came before: doubled by the network, or replayed."""
    damaged: int = 0
    """Their checksum is another."""
    forged: int = 0
    """Their MAC is another."""
    nonsense: int = 0
    """Genuine, but not what the protocol allows."""

    @property
    def total(self) -> int:
        return self.malformed + self.unknown + self.repeated + self.damaged + self.forged + self.nonsense


class Seal:
    """Makes and checks the MACs of one sender in one round."""

    def __init__(self, token: bytes, sender: int) -> None:
        key = hashlib.blake2b(bytes([sender]), key=token, digest_size=16, person=b"datagram seal").digest()
        self._cipher = AESGCM(key)

    def mac(self, nonce: bytes, data: memoryview) -> bytes:
        return self._cipher.encrypt(nonce, b"", data)[:MAC_BYTES]


def round_id(token: bytes) -> bytes:
    """Says nothing of the token."""
    return hashlib.blake2b(b"round", key=token, digest_size=ROUND_BYTES).digest()


def codec_byte(name: str) -> int:
    """Tells codecs apart, mostly: the terms have told them apart before."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0]


def pack(stream: Stream, seal: Seal, sequences: Integers, offsets: Integers, rows: Frames) -> Frames:
    """The datagrams of these packets, in one array, as the kernel's segmentation takes them."""
    count, size = rows.shape
    assert size == stream.size <= PAYLOAD_BYTES_MAX
    frames = np.empty((count, HEADER_BYTES + size + MAC_BYTES), np.uint8)
    frames[:, : STREAM.size] = np.frombuffer(stream.packed(), np.uint8)
    frames[:, HEADER_BYTES:-MAC_BYTES] = rows
    whole = frames.reshape(-1).data
    prefix = _nonce_prefix(stream)
    width = frames.shape[1]
    places = zip(range(0, count * width, width), sequences.tolist(), offsets.tolist(), strict=True)
    for at, sequence, offset in places:
        end = at + width - MAC_BYTES
        checksum = xxh3_64_intdigest(whole[at + HEADER_BYTES : end]) & 0xFFFFFFFF
        PLACE.pack_into(whole, at + STREAM.size, sequence, offset, checksum)
        whole[end : end + MAC_BYTES] = seal.mac(prefix + sequence.to_bytes(4, "little"), whole[at:end])
    return frames


def pack_control(stream: Stream, seal: Seal, sequence: int, body: bytes) -> bytes:
    """A hello, mark or report."""
    row = np.frombuffer(body, np.uint8).reshape(1, -1)
    return pack(stream, seal, np.array([sequence]), np.zeros(1, np.intp), row).tobytes()


def streams_in(frames: Frames, refusals: Refusals) -> Iterable[tuple[Stream, Frames]]:
    """Datagrams of equal size, told apart by stream; what is none is dropped and counted."""
    count, width = frames.shape
    size = width - HEADER_BYTES - MAC_BYTES
    if not 0 < size <= PAYLOAD_BYTES_MAX:
        refusals.malformed += count
        return
    while len(frames):
        alike = (frames[:, : STREAM.size] == frames[0, : STREAM.size]).all(axis=1)
        same = frames if alike.all() else frames[alike]
        stream = _stream_from(frames[0, : STREAM.size].tobytes())
        if stream is None or stream.size != size:
            refusals.malformed += len(same)
        else:
            yield stream, same
        if same is frames:
            return
        frames = frames[~alike]


def genuine(
    stream: Stream, frames: Frames, seal: Seal, seen: bytearray, refusals: Refusals
) -> tuple[Integers, Integers, Frames]:
    """Sequence numbers, offsets and payloads of the datagrams that are new, whole and sealed; `seen` has a byte for
    each sequence number and remembers them. The payloads may lie in `frames`."""
    count, width = frames.shape
    if not frames.flags.c_contiguous:
        frames = np.ascontiguousarray(frames)
    whole = frames.reshape(-1).data
    prefix = _nonce_prefix(stream)
    kept: list[int] = []
    sequences: list[int] = []
    offsets: list[int] = []
    for number in range(count):
        at = number * width
        end = at + width - MAC_BYTES
        sequence, offset, checksum = PLACE.unpack_from(whole, at + STREAM.size)
        if sequence >= len(seen):
            refusals.malformed += 1
        elif seen[sequence]:
            refusals.repeated += 1
        elif xxh3_64_intdigest(whole[at + HEADER_BYTES : end]) & 0xFFFFFFFF != checksum:
            refusals.damaged += 1
        elif seal.mac(prefix + sequence.to_bytes(4, "little"), whole[at:end]) != whole[end : end + MAC_BYTES]:
            refusals.forged += 1
        else:
            seen[sequence] = 1
            kept.append(number)
            sequences.append(sequence)
            offsets.append(offset)
    rows = frames[:, HEADER_BYTES:-MAC_BYTES]
    return np.array(sequences, np.intp), np.array(offsets, np.intp), rows if len(kept) == count else rows[kept]


def genuine_control(
    stream: Stream, frame: Frames, seal: Seal, newest: int, refusals: Refusals
) -> tuple[int, bytes] | None:
    """Sequence number and body of a control datagram newer than `newest`."""
    whole = np.ascontiguousarray(frame).reshape(-1).data
    end = len(whole) - MAC_BYTES
    sequence, _, checksum = PLACE.unpack_from(whole, STREAM.size)
    if sequence <= newest:
        refusals.repeated += 1
    elif xxh3_64_intdigest(whole[HEADER_BYTES:end]) & 0xFFFFFFFF != checksum:
        refusals.damaged += 1
    elif seal.mac(_nonce_prefix(stream) + sequence.to_bytes(4, "little"), whole[:end]) != whole[end:]:
        refusals.forged += 1
    else:
        return sequence, bytes(whole[HEADER_BYTES:end])
    return None


def _nonce_prefix(stream: Stream) -> bytes:
    """With the sequence number behind it 12 bytes."""
    return struct.pack("<BBHI", stream.kind, stream.sender, stream.span, 0)


def _stream_from(head: bytes) -> Stream | None:
    first, kind, codec, sender, of_round, span, size, count = STREAM.unpack(head)
    if first != FIRST_BYTE or kind not in Kind.__members__.values():
        return None
    return Stream(Kind(kind), codec, sender, of_round, span, size, count)

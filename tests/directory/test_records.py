"""A record is believed only if its owner signed it, for this key of this swarm, within the limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from moshpitd.averaging.names import key
from moshpitd.directory import DirectoryConfig, DirectoryError
from moshpitd.directory.records import Notary, RecordRefused
from moshpitd.identity import Identity

CONFIG = DirectoryConfig()
HERE = key("here")


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity.open(tmp_path)


def test_what_is_written_is_read(identity: Identity) -> None:
    written = Notary(b"swarm", CONFIG).write(identity, HERE, "lease", b"body", 30.0)
    read = Notary(b"swarm", CONFIG).check(HERE, written.raw)
    assert read == written
    assert (read.peer, read.incarnation, read.kind, read.body) == (
        identity.peer_id,
        identity.incarnation,
        "lease",
        b"body",
    )
    assert read.ttl_s == 30.0 and not read.withdrawn


def test_a_typical_record_is_small(identity: Identity) -> None:
    assert len(Notary(b"swarm", CONFIG).write(identity, HERE, "lease", bytes(110), 30.0).raw) <= 240
    assert len(Notary(b"swarm", CONFIG).write(identity, HERE, "k" * 32, bytes(512), 30.0).raw) < 900


def test_every_flipped_bit_is_a_forgery(identity: Identity) -> None:
    raw = Notary(b"swarm", CONFIG).write(identity, HERE, "lease", b"body", 30.0).raw
    reader = Notary(b"swarm", CONFIG)
    for index in range(len(raw)):
        forged = bytearray(raw)
        forged[index] ^= 1
        with pytest.raises(RecordRefused):
            reader.check(HERE, bytes(forged))


def test_a_record_of_another_key_or_swarm_is_refused(identity: Identity) -> None:
    raw = Notary(b"swarm", CONFIG).write(identity, HERE, "lease", b"body", 30.0).raw
    with pytest.raises(RecordRefused, match="did not sign"):
        Notary(b"swarm", CONFIG).check(key("elsewhere"), raw)
    with pytest.raises(RecordRefused, match="did not sign"):
        Notary(b"other swarm", CONFIG).check(HERE, raw)


@pytest.mark.parametrize("raw", [b"", b"\1", bytes(118), bytes(200), b"\1" * 200, bytes(5000)])
def test_what_is_no_record_is_refused(raw: bytes) -> None:
    with pytest.raises(RecordRefused):
        Notary(b"swarm", CONFIG).check(HERE, raw)


def test_a_record_beyond_the_readers_limits_is_refused_however_well_signed(identity: Identity) -> None:
    generous = Notary(b"swarm", DirectoryConfig(body_bytes_max=600, ttl_s_max=1e6))
    reader = Notary(b"swarm", CONFIG)
    with pytest.raises(RecordRefused, match="record of"):
        reader.check(HERE, generous.write(identity, HERE, "k" * 32, bytes(600), 30.0).raw)
    with pytest.raises(RecordRefused, match="body of 520"):
        reader.check(HERE, generous.write(identity, HERE, "lease", bytes(520), 30.0).raw)
    with pytest.raises(RecordRefused, match="ttl"):
        reader.check(HERE, generous.write(identity, HERE, "lease", b"", 1e6).raw)


@pytest.mark.parametrize(
    ("kind", "body", "ttl_s", "why"),
    [
        ("lease", bytes(513), 30.0, "513 bytes is too large"),
        ("", b"", 30.0, "kind"),
        ("k" * 33, b"", 30.0, "kind"),
        ("lease", b"", 0.0, "ttl"),
        ("lease", b"", float("nan"), "ttl"),
        ("lease", b"", 3601.0, "ttl"),
    ],
)
def test_what_nobody_would_take_is_refused_to_the_caller(
    identity: Identity, kind: str, body: bytes, ttl_s: float, why: str
) -> None:
    with pytest.raises(DirectoryError, match=why):
        Notary(b"swarm", CONFIG).write(identity, HERE, kind, body, ttl_s)

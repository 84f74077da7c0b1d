"""A peer is its key: kept safe, the same after every restart, and told apart when copied."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from moshpitd.identity import Identity, IdentityError, node_id, peer_id, verify


def key_file(data_dir: Path) -> Path:
    (found,) = data_dir.glob("*.pem")
    return found


def test_a_restart_keeps_the_peer_and_draws_another_incarnation(tmp_path: Path) -> None:
    before, after = Identity.open(tmp_path / "data"), Identity.open(tmp_path / "data")
    assert before.peer_id == after.peer_id == hashlib.sha256(before.public_key).hexdigest() == peer_id(after.public_key)
    assert after.node_id == node_id(after.peer_id) == bytes.fromhex(after.peer_id)[:20]
    assert before.incarnation != after.incarnation


def test_nobody_else_can_read_the_key_nor_enter_a_directory_made_for_it(tmp_path: Path) -> None:
    Identity.open(tmp_path / "home" / "data")
    assert stat.S_IMODE(key_file(tmp_path / "home" / "data").stat().st_mode) == 0o600
    for directory in (tmp_path / "home" / "data", tmp_path / "home"):  # where the socket may be, as in the README
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_key_that_others_can_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    Identity.open(tmp_path)
    path = key_file(tmp_path)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 10_000, b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_broken_key_file_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    Identity.open(tmp_path)
    path = key_file(tmp_path)
    path.write_bytes(content)
    with pytest.raises(IdentityError, match=str(path)):
        Identity.open(tmp_path)
    assert path.read_bytes() == content


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    Identity.open(tmp_path)
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key_file(tmp_path).write_bytes(other)
    with pytest.raises(IdentityError, match="another kind than Ed25519"):
        Identity.open(tmp_path)


def test_a_data_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with pytest.raises(IdentityError, match="--data-dir"):
        Identity.open(tmp_path / "data")


def test_a_signature_holds_for_its_context_and_parts_only(tmp_path: Path) -> None:
    identity, other = Identity.open(tmp_path / "a"), Identity.open(tmp_path / "b")
    signature = identity.sign("records", b"ab", b"c")
    assert verify(identity.public_key, signature, "records", b"ab", b"c")
    assert not verify(identity.public_key, signature, "records", b"a", b"bc")
    assert not verify(identity.public_key, signature, "hello", b"ab", b"c")
    assert not verify(other.public_key, signature, "records", b"ab", b"c")
    assert not verify(b"short", signature, "records", b"ab", b"c")
    assert not verify(identity.public_key, b"", "records", b"ab", b"c")


def test_sequence_numbers_grow_when_the_clock_stands_or_goes_back(tmp_path: Path) -> None:
    wall = 1_000_000
    identity = Identity.open(tmp_path, wall_ms=lambda: wall)
    drawn = [identity.next_sequence() for _ in range(5)]
    wall = 10
    drawn += [identity.next_sequence() for _ in range(5)]
    assert drawn == list(range(1_000_000, 1_000_010))
    wall = 2_000_000
    assert identity.next_sequence() == 2_000_000


def test_sequence_numbers_grow_over_a_restart_with_a_clock_set_back(tmp_path: Path) -> None:
    highest = 0
    for wall in (5_000_000, 4_000_000, 1):
        identity = Identity.open(tmp_path, wall_ms=lambda wall=wall: wall)  # type: ignore[misc]
        drawn = [identity.next_sequence() for _ in range(3)]
        assert drawn[0] > highest
        highest = drawn[-1]


def test_a_broken_sequence_file_is_named(tmp_path: Path) -> None:
    Identity.open(tmp_path).next_sequence()
    path = tmp_path / "sequence"
    path.write_text("soon")
    with pytest.raises(IdentityError, match=str(path)):
        Identity.open(tmp_path)

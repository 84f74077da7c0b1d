"""Who this daemon is: an Ed25519 key in its data directory, the names that follow from it, and what it signs.

Knows the key file, the file of sequence numbers and how signed parts are framed. Does not know what is signed or who
asks. Whoever holds a copy of the data directory *is* this peer; only the incarnation tells two running copies apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from moshpitd.averaging.names import Incarnation, PeerId, digest

KEY_FILE = "identity.pem"
SEQUENCE_FILE = "sequence"
KEY_FILE_BYTES_MAX = 4096
NODE_ID_BYTES = 20
SEQUENCES_RESERVED = 60_000
"""Sequence numbers are wall milliseconds while the clock runs forward, so this is one write a minute, and a restart
after a crash goes on at most a minute ahead of the clock."""


class IdentityError(Exception):
    """A file of the identity cannot be used; the message names it and the way out."""


class Identity:
    """One start of one peer: its key, its names, its signatures and its sequence numbers."""

    def __init__(self, private_key: Ed25519PrivateKey, data_dir: Path, wall_ms: Callable[[], int]) -> None:
        """Use `Identity.open`."""
        self._private_key = private_key
        self._sequence_file = data_dir / SEQUENCE_FILE
        self._wall_ms = wall_ms
        self._sequence = self._sequence_reserved = _read_sequence(self._sequence_file)
        self.public_key = private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id = peer_id(self.public_key)
        self.node_id = node_id(self.peer_id)
        self.incarnation = Incarnation(int.from_bytes(os.urandom(8), "big"))

    @classmethod
    def open(cls, data_dir: Path, *, wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> Identity:
        """The identity kept in `data_dir`; both are made if they are not there. Raises `IdentityError`."""
        try:
            for directory in (*reversed(data_dir.parents), data_dir):
                if not directory.exists():  # `parents=True` would open those above to others, sockets beside us as well
                    directory.mkdir(mode=0o700, exist_ok=True)
            path = data_dir / KEY_FILE
            if not path.exists():
                _create_key(path)
            return cls(_read_key(path), data_dir, wall_ms)
        except OSError as error:
            raise IdentityError(
                f"cannot keep an identity in {data_dir}: {error}; choose another --data-dir or make it writable"
            ) from error

    def sign(self, context: str, *parts: bytes) -> bytes:
        """A signature of 64 bytes over the framed parts; a context's signature is worthless in any other."""
        return self._private_key.sign(digest(context, *parts))

    def next_sequence(self) -> int:
        """max(wall milliseconds, last + 1): grows always, also over a restart and when the clock was set back."""
        self._sequence = max(self._wall_ms(), self._sequence + 1)
        if self._sequence >= self._sequence_reserved:
            # Written before the first of them is used: a crash skips numbers, it never repeats one.
            self._sequence_reserved = self._sequence + SEQUENCES_RESERVED
            try:
                _write_durably(self._sequence_file, str(self._sequence_reserved).encode())
            except OSError as error:
                raise IdentityError(
                    f"cannot write {self._sequence_file}: {error}; free the disk or fix its mode"
                ) from error
        return self._sequence


def peer_id(public_key: bytes) -> PeerId:
    """The peer that owns a raw Ed25519 public key."""
    return PeerId(hashlib.sha256(public_key).hexdigest())


def node_id(peer: PeerId) -> bytes:
    """Where a peer lives in the DHT: nobody chooses the place, it follows from the key."""
    return bytes.fromhex(peer)[:NODE_ID_BYTES]


def verify(public_key: bytes, signature: bytes, context: str, *parts: bytes) -> bool:
    """Whether the owner of `public_key` signed exactly these parts in this context."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, digest(context, *parts))
    except (InvalidSignature, ValueError):
        return False
    return True


def _create_key(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        _write_new(draft, pem)
        # A link fails where a rename would replace: of two daemons that start at once, both use the first one's key.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _read_key(path: Path) -> Ed25519PrivateKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise IdentityError(f"{path} has mode {mode:04o}: others can be this peer; run: chmod 600 {path}")
    with path.open("rb") as file:
        pem = file.read(KEY_FILE_BYTES_MAX)
    way_out = "restore it from a backup, or delete it to start as a new peer"
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"{path} is not a private key; {way_out}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path} holds a key of another kind than Ed25519; {way_out}")
    return key


def _read_sequence(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii")
        if text.isdecimal() and len(text) < 19:
            return int(text)
    except FileNotFoundError:
        return 0
    except UnicodeDecodeError:
        pass
    raise IdentityError(f"{path} is not a sequence number; delete it if this machine's clock is right")


def _write_new(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_durably(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        _write_new(draft, content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

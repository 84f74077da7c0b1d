"""Where a datagram goes: IP literals and ports, how people write them, how they travel in a node list.

Knows host names only to resolve them away: past `resolve` there are IP literals. IPv4 addresses that a dual-stack
socket reports as ::ffff:a.b.c.d are plain IPv4 everywhere but inside the socket.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

RESOLVE_TIMEOUT_S = 5.0


class AddressError(ValueError):
    """Something written as HOST:PORT is not, or its host has no address."""


class Address(NamedTuple):
    """An IP literal in its canonical spelling, and a port. Compare and hash at will."""

    host: str
    port: int

    def __str__(self) -> str:
        """As people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def pack(self) -> bytes:
        """6 bytes for IPv4, 18 for IPv6; a scope is left out, it means nothing elsewhere."""
        return ip_address(self.host.partition("%")[0]).packed + self.port.to_bytes(2, "big")

    @staticmethod
    def unpack(raw: bytes) -> Address | None:
        """The address if it is one that a datagram may be sent to."""
        if len(raw) not in (6, 18):
            return None
        ip, port = ip_address(raw[:-2]), int.from_bytes(raw[-2:], "big")
        if ip.is_unspecified or ip.is_multicast or port == 0 or raw[:4] == b"\xff\xff\xff\xff":
            return None
        return address(str(ip), port)


@lru_cache(maxsize=4096)
def _canonical(host: str) -> str:
    ip: IPv4Address | IPv6Address = ip_address(host)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ip)


def address(host: str, port: int) -> Address:
    """The address of an IP literal. Raises ValueError for a host name."""
    return Address(_canonical(host), port)


def split_host_port(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT. Raises `AddressError`."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise AddressError(f"{text!r}: write an IPv6 address with its port as [{host}]:{port}")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise AddressError(f"{text!r} is not HOST:PORT")
    return host, int(port)


async def resolve(text: str) -> tuple[Address, ...]:
    """Every address that HOST:PORT stands for, IPv4 first. Raises `AddressError`."""
    host, port = split_host_port(text)
    try:
        return (address(host, port),)
    except ValueError:
        pass  # a name
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        reason = error.strerror if isinstance(error, socket.gaierror) else "no answer from the name server"
        raise AddressError(f"{text}: the host name {host} cannot be resolved ({reason})") from error
    unique = dict.fromkeys(address(str(entry[4][0]), port) for entry in found)
    return tuple(sorted(unique, key=lambda one: ":" in one.host))


def pack_nodes(nodes: Iterator[tuple[bytes, Address]]) -> bytes:
    """A node list as it travels: id, length, address."""
    return b"".join(node_id + bytes([len(raw)]) + raw for node_id, at in nodes for raw in (at.pack(),))


def unpack_nodes(raw: bytes, *, limit: int) -> list[tuple[bytes, Address]]:
    """What is sound in a node list; what is not is left out."""
    nodes: list[tuple[bytes, Address]] = []
    while len(raw) >= 27 and len(nodes) < limit:
        node_id, length = raw[:20], raw[20]
        at = Address.unpack(raw[21 : 21 + length])
        raw = raw[21 + length :]
        if at is not None:
            nodes.append((node_id, at))
    return nodes

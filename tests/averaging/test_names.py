"""Names hash into orders that every peer computes alike."""

from __future__ import annotations

import hashlib
import itertools

from moshpitd.averaging.names import PeerId, digest, key, short


def test_parts_are_framed_so_that_no_two_lists_of_parts_meet() -> None:
    lists: list[tuple[bytes | str | int, ...]] = [
        (),
        ("",),
        ("", ""),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1,),
        (-1,),
        (256,),
        (1, 0),
        (0, 1),
        ("1",),
    ]
    assert len({digest(*parts) for parts in lists}) == len(lists)


def test_text_and_its_bytes_are_the_same_part() -> None:
    assert digest("schön") == digest("schön".encode())


def test_numbers_of_128_bits_have_names_too() -> None:
    edges = (-(1 << 127), -1, 0, 1, (1 << 64) - 1, (1 << 127) - 1)
    assert all(digest(one) != digest(other) for one, other in itertools.combinations(edges, 2))


def test_the_framing_is_part_of_the_protocol() -> None:
    """Four bytes of length before each part, numbers as 16 bytes: peers of different versions must find each other."""
    framed = b"\0\0\0\x05terms" + b"\0\0\0\x01\xff" + b"\0\0\0\x10" + bytes(15) + b"\x07"
    assert digest("terms", b"\xff", 7) == hashlib.sha256(framed).digest()


def test_a_key_is_twenty_bytes_of_the_digest() -> None:
    assert key("grid", 1) == digest("grid", 1)[:20]


def test_people_see_eight_digits() -> None:
    assert short(PeerId("0123456789" * 6 + "abcd")) == "01234567"

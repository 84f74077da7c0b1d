"""What can be wrong, and whose fault it is.

A peer's fault is a `RemoteProtocolError`: raised deep, caught once at the door, costs that peer only. A trainer's fault
or an unmet wish is a `SessionError`: it becomes a status at the local door. Our own faults are assertions. A round that
failed is none of these: it is an outcome.
"""

from __future__ import annotations


class RemoteProtocolError(Exception):
    """A peer sent what the protocol does not allow."""


class SessionError(Exception):
    """A trainer's call cannot be done; the message names the culprit and the way out. The vector is untouched."""


class InvalidInput(SessionError):
    """The call itself is wrong: bad weight, non-finite values, an integer tensor, an empty layout."""


class SessionNotFound(SessionError):
    """No such session (or it was closed)."""


class Precondition(SessionError):
    """The call is sound but this swarm or session cannot take it: terms differ, session exists, epoch too far."""


class ShardsChanged(Precondition):
    """The others went on without this peer: what it owned has other owners."""


class NoGroup(SessionError):
    """Time ran out before enough peers were there."""


class Unavailable(SessionError):
    """The daemon is leaving or not connected."""


class Exhausted(SessionError):
    """A limit was met: too many sessions, too large a vector."""

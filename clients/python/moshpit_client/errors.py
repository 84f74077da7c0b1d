"""What can go wrong, by name. Every message says what to do next; after any of these the tensors are as they were.

Knows how a gRPC status becomes an error. Does not know calls.
"""

from __future__ import annotations

import grpc

METADATA_KEY = "moshpitd-error"
"""Is in the trailing metadata of every status that the daemon itself gave."""


class MoshpitError(Exception):
    """All errors of this package."""


class DaemonUnreachable(MoshpitError, ConnectionError):
    """No daemon answers on the socket, or it went away in the middle of a call."""


class DaemonLeaving(MoshpitError):
    """The daemon is there, but leaving or not part of its swarm yet."""


class InvalidInput(MoshpitError, ValueError):
    """The call is wrong: an integer tensor, NaN, a negative weight, an empty layout."""


class NotFound(MoshpitError, LookupError):
    """The daemon has no such session."""


class PreconditionFailed(MoshpitError):
    """This swarm cannot take it: the layouts differ, the session's name is taken, the epoch is too far."""


class ShardsChanged(PreconditionFailed):
    """The others went on without this trainer, and what it owned has other owners: call `broadcast_shard`, which brings
    their values, then `reduce_scatter`, which gives it a new shard."""


class NoGroup(MoshpitError, TimeoutError):
    """Time ran out before enough peers were there."""


class ResourceExhausted(MoshpitError):
    """A limit was met."""


class DaemonBug(MoshpitError):
    """A bug of moshpitd."""


class WrongProcess(MoshpitError):
    """A forked child used its parent's connection."""


_KINDS: dict[grpc.StatusCode, type[MoshpitError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.DEADLINE_EXCEEDED: NoGroup,
    grpc.StatusCode.UNAVAILABLE: DaemonLeaving,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
}


def from_status(error: grpc.RpcError, socket: str, *, connected: bool) -> MoshpitError:
    """The error of a failed call; `connected` when the daemon had answered on this socket before."""
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details() or ""
    for key, kind in error.trailing_metadata() or ():
        if key == METADATA_KEY:
            return (ShardsChanged if kind == ShardsChanged.__name__ else _KINDS.get(code, DaemonBug))(details)
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(f"the daemon behind {socket} takes no more calls now ({details}): try again later")
        case grpc.StatusCode.UNIMPLEMENTED:
            return PreconditionFailed(
                f"the daemon behind {socket} does not know this call: bring moshpitd and moshpit_client to one version"
            )
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            if connected:
                return DaemonUnreachable(
                    f"the daemon behind {socket} went away ({details}): look at its log, that is the output of "
                    "`moshpitd run`, start it again, then connect and open the session anew"
                )
            return DaemonUnreachable(
                f"no daemon answers on {socket} ({details}): start one with `moshpitd run --swarm NAME`, "
                "or name its socket with connect(path) or MOSHPITD_SOCKET"
            )
        case _:
            return DaemonBug(f"the daemon behind {socket} answered {code.name} ({details}): report it with its log")

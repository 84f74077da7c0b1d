"""Average a trainer's tensors with the swarm, through the moshpitd daemon of this machine.

import moshpit_client

with moshpit_client.connect() as daemon:
    with daemon.open_session({"w": w, "b": b}, min_peers=8) as session:
        receipt = session.average(weight=32.0, timeout=30.0)  # in place
"""

from moshpit_client.compressors import ArcTopK
from moshpit_client.compute_budget import BudgetState, ComputeBudget, Step
from moshpit_client.daemon import Daemon, connect
from moshpit_client.errors import (
    DaemonBug,
    DaemonLeaving,
    DaemonUnreachable,
    InvalidInput,
    MoshpitError,
    NoGroup,
    NotFound,
    PreconditionFailed,
    ResourceExhausted,
    ShardsChanged,
    WrongProcess,
)
from moshpit_client.receipt import (
    Contributor,
    Dropped,
    Local,
    Member,
    Receipt,
    Round,
    Seconds,
    Shard,
    Span,
    Traffic,
    Version,
)
from moshpit_client.session import Delta, Progress, Session
from moshpit_client.status import Bandwidth, Cohort, ConfigValue, Peer, SessionStatus, Status, TrainerStatus

__all__ = [
    "ArcTopK",
    "Bandwidth",
    "BudgetState",
    "Cohort",
    "ComputeBudget",
    "ConfigValue",
    "Contributor",
    "Daemon",
    "DaemonBug",
    "DaemonLeaving",
    "DaemonUnreachable",
    "Delta",
    "Dropped",
    "InvalidInput",
    "Local",
    "Member",
    "MoshpitError",
    "NoGroup",
    "NotFound",
    "Peer",
    "PreconditionFailed",
    "Progress",
    "Receipt",
    "ResourceExhausted",
    "Round",
    "Seconds",
    "Session",
    "SessionStatus",
    "Shard",
    "ShardsChanged",
    "Span",
    "Status",
    "Step",
    "Traffic",
    "TrainerStatus",
    "Version",
    "WrongProcess",
    "connect",
]

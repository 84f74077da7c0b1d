"""The door to the DHT: announce and look up signed records, find the swarm and stay in touch with it."""

from moshpitd.directory.addresses import Address, AddressError, resolve, split_host_port
from moshpitd.directory.config import DirectoryConfig
from moshpitd.directory.directory import Directory, Neighbour
from moshpitd.directory.protocol import Counters
from moshpitd.directory.records import DirectoryError
from moshpitd.directory.socket import DatagramSocket, PortInUse

__all__ = [
    "Address",
    "AddressError",
    "Counters",
    "DatagramSocket",
    "Directory",
    "DirectoryConfig",
    "DirectoryError",
    "Neighbour",
    "PortInUse",
    "resolve",
    "split_host_port",
]

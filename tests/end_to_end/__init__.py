"""Whole swarms: daemons as processes, real sockets, the real client and command line."""

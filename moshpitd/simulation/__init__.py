"""The driver's and the doors' twin: the production machines under virtual time.

Knows how to carry out the effects of real sessions on a heap of events: channels, streams, a directory, links, faults.
Does not know sockets, threads or the real clock, and decides nothing that a session decides. All that varies comes from
one seed.
"""

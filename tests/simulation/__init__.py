"""The simulation itself: its clock, network and directory, its checkers, and the figures of the real machines."""

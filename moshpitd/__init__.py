"""moshpitd: a daemon that averages tensors with others over unreliable machines."""

__version__ = "0.1.0"

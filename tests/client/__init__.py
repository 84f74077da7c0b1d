"""The Python client against the real local door, served by another process."""

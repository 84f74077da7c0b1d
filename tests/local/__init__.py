"""The local door against a scripted driver."""

"""Chaos on real processes: fault proxies, an injector that replays from its seed, and an oracle that reads receipts."""

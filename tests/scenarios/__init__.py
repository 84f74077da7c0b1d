"""Short stories of a few peers: each has a point, a seed and a golden trace that a person can read."""

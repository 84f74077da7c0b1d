"""The figures that moshpitd promises, measured: `python -m tests.benchmarks`."""

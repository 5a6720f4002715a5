"""Benchmarks: ratios measured side by side on this machine. Not part of the tests; `make bench` runs them (docs/SPEED.md)."""

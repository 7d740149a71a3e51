"""Benchmarks of everything but batching (bench.py). Each prints a table, then one JSON line with all it measured."""

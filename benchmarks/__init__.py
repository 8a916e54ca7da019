"""Benchmarks: each is one command, prints its machine, versions and both sides of a ratio, and writes JSON to results/."""

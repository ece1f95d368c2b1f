"""Benchmarks: one folder per claim, each printing our figure beside the peers' from the same run."""

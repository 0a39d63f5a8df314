"""Shared by all benchmarks: the machine's limits, interleaved timing, peak memory, tables."""

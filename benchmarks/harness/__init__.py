"""Peak rates, interleaved timing, peak memory, tables."""

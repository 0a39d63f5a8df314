"""What every benchmark here shares: the machine and its limits, interleaved timing, memory, tables, charts."""

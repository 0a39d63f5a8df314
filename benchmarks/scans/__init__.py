"""``scan_speed.py``: problems, implementations, plans for a CPU and a GPU, targets, tables, chart."""

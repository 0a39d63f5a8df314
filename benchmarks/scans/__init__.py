"""What ``scan_speed.py`` measures: problems, contenders, plans for a CPU and a GPU, targets, chart."""

"""Modules of ``scan_speed.py``."""

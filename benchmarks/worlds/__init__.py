"""Worlds whose cells come back into view: memories beside each other."""

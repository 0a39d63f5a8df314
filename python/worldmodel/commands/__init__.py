"""The commands of ``python -m worldmodel``."""

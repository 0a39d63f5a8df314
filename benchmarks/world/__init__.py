"""Modules of ``world_model.py`` and ``world_memory.py``."""

"""``world_model.py`` and ``world_memory.py``: tasks, runs, tables, charts."""

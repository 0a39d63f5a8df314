"""Scores of the world model on tasks that others publish figures of, after a given number of steps.

    python benchmarks/world_tasks.py                                      # everything: many hours
    python benchmarks/world_tasks.py --tasks MemoryLength-100 --seeds 0
    python benchmarks/world_tasks.py --list                               # finished and missing runs
    python benchmarks/world_tasks.py --report                             # table and chart

Options and files as of ``world_model.py``.
"""

import sys

import world_model

if __name__ == "__main__":
    sys.exit(world_model.main("world_tasks"))

"""A world model on the kernels of wmkernels: memory, perception, prediction, evaluation and decision in one loop.

This release holds the package alone, so that its name and place are settled: it exports nothing yet. The memory that
the world model will stand on is in :mod:`wmkernels`.
"""

__all__: list[str] = []

"""Cross-process reduction of statistics and gradients; a distributed run replaces ``Reduction``."""

from collections.abc import Sequence

from torch import Tensor, nn


class Reduction:
    """The identity, for one process."""

    def reduce_statistics(self, values: Tensor) -> Tensor:
        """Gathers (rows, ...) of all processes, whose row counts may differ."""
        return values

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages gradients in place; ``parameters`` have the same order in every process."""


LOCAL = Reduction()

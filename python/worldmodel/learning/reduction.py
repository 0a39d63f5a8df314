"""Cross-process reduction of running statistics and gradients.

Nothing else in ``Learner`` depends on the number of processes; a distributed run replaces ``Reduction``.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class Reduction:
    """The identity, for one process."""

    def reduce_statistics(self, values: Tensor) -> Tensor:
        """Gathers (rows, ...) of every process; row counts may differ, other sizes and dtype not.

        Returns:
            (rows of all processes, ...), the same in every process.
        """
        return values

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages gradients over processes in place; ``parameters`` is one group, ordered equally everywhere."""


LOCAL = Reduction()

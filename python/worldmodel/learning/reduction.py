"""What crosses processes: running statistics and gradients.

``Learner`` passes both through a ``Reduction``, and nothing else of an update depends on how many processes there are.
This one is that of a single process; a distributed run replaces it.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class Reduction:
    """The reduction of one process: everything stays as it is."""

    def reduce_statistics(self, values: Tensor) -> Tensor:
        """The rows of all processes.

        Args:
            values: (rows, ...) of this process, in any number of rows; the other sizes and the dtype are the same in
                all processes.

        Returns:
            (rows of all processes, ...), the same in every process.
        """
        return values

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradient of each parameter, in place, by the mean over processes.

        Args:
            parameters: of one group, in the same order in every process.
        """


LOCAL = Reduction()

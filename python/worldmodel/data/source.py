"""Where batches come from: what a learner asks of replay, and of any data set in its place."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from worldmodel.data.batch import Batch
from worldmodel.data.spaces import ActionSpec, ObservationSpec


@runtime_checkable
class Source(Protocol):
    """A source of batches. ``Replay`` is one.

    Attributes:
        observation_spec: the modalities of its observations.
        action_spec: shape and dtype of its actions.
        transitions: transitions that can be sampled.
        epochs: epochs completed; an epoch samples every chunk once.
    """

    observation_spec: ObservationSpec
    action_spec: ActionSpec

    @property
    def transitions(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory; 0 for data that stays on disk."""
        ...

    def __len__(self) -> int:
        """Sequence chunks that can be sampled; 0 means that ``sample`` would raise."""
        ...

    def sample(self, version: int = 0) -> tuple[Batch, dict[str, float]]:
        """The next batch, and metrics of it by name.

        Args:
            version: updates of the weights so far, from which the age of stored states is counted.

        Raises:
            RuntimeError: there is nothing to sample.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that later batches depend on, as ``runs.storage.save`` takes it."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from what ``state_dict`` returned."""
        ...

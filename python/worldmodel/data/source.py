"""The protocol of batch sources."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from worldmodel.data.batch import Batch, State
from worldmodel.data.spaces import ActionSpec, ObservationSpec


@runtime_checkable
class Source(Protocol):
    """A source of batches, such as ``Replay``.

    Attributes:
        epochs: completed epochs; an epoch samples every chunk once.
    """

    observation_spec: ObservationSpec
    action_spec: ActionSpec

    @property
    def transitions(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Memory; 0 for data on disk."""
        ...

    def __len__(self) -> int:
        """Sequence chunks."""
        ...

    def sample(self, version: int = 0) -> tuple[Batch, dict[str, float]]:
        """The next batch and its metrics, ``version`` updates into training.

        Raises:
            RuntimeError: nothing to sample.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """For ``runs.storage.save``."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...


@runtime_checkable
class RefreshedSource(Protocol):
    """A source whose batches may have ``Batch.carry``."""

    def refresh(self, states: State, version: int) -> None:
        """Takes the memory states after ``carry`` steps of the newest batch, (batch, ...).

        They are of weights with ``version`` updates.
        """
        ...

"""Bytes that an update takes, measured on small ones of the same world model, and what bounds them."""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from worldmodel.data.batch import Batch
from worldmodel.data.kinds import Modality
from worldmodel.data.spaces import ROOT, ActionSpec, ObservationSpec
from worldmodel.learning.learner import Learner, LearnerConfig
from worldmodel.model.perception import Perception
from worldmodel.model.world_model import WorldModel

# Resident bytes per byte alive. The C allocator keeps freed blocks of up to 32 MB, so those of chunks, which come and
# go, count several times: measured 6.5 with chunks of 60 MB, 5 with 42 MB, 2.6 with 170 MB.
CHUNK_OVERHEAD = 7
OVERHEAD = 1.4
WEIGHT_COPIES = 4  # gradients, Adam's two means, and one array of temporary values
_MEASURED_STEPS = 256


@dataclasses.dataclass(frozen=True)
class UpdateMemory:
    """Bytes of an update.

    Attributes:
        batch: of a row, in the batch of this update and in the one before.
        row: of a row in memory, prediction and imagination.
        weights: of gradients and the optimiser.
        step: of a step in perception.
        steps: per row.
    """

    batch: int
    row: float
    weights: int
    step: float
    steps: int

    @classmethod
    def of(cls, world_model: WorldModel, learner: LearnerConfig, window: int) -> "UpdateMemory":
        """Measures small updates on the CPU; no random generator moves, no weight changes."""
        numbers = sum(array.nbytes for array in world_model.observation_spec.zeros(1).values())
        parameters = sum(parameter.nbytes for parameter in world_model.parameters())
        steps = min(window, _MEASURED_STEPS)
        with torch.random.fork_rng(devices=[]):
            # Perception of one number leaves the other functions.
            spec = ObservationSpec({ROOT: Modality("vector", (1,), "float32")})
            plain = dataclasses.replace(world_model.config.perception, rare=0.0)  # a number has no classes
            config = dataclasses.replace(world_model.config, perception=plain)
            others = Learner(WorldModel(spec, world_model.action_spec, config), learner)
            rows = [peak_bytes(functools.partial(_update, others, count, steps)) for count in (1, 2)]
            perception = Perception(world_model.observation_spec, world_model.config.perception)
            chunks = [peak_bytes(functools.partial(_perceive, perception, count)) for count in (4, 8)]
        return cls(
            2 * window * numbers,
            (rows[1] - rows[0]) * window / steps,
            WEIGHT_COPIES * parameters,
            (chunks[1] - chunks[0]) / 4,
            window,
        )

    def total(self, rows: int, chunk_steps: float | None = None) -> float:
        """Resident bytes with ``rows`` rows, ``chunk_steps`` of their steps at once in perception."""
        steps = rows * self.steps if chunk_steps is None else chunk_steps
        return self.weights + rows * (self.batch + OVERHEAD * self.row) + CHUNK_OVERHEAD * self.step * steps

    def most_rows(self, limit: float) -> int:
        return int((limit - self.total(0, 1)) // (self.total(1, 1) - self.total(0, 1)))

    def chunk_steps(self, rows: int, limit: float) -> int | None:
        """The most steps at once, at least one; None if all fit."""
        if self.total(rows) <= limit:
            return None
        return max(1, int((limit - self.total(rows, 0)) // (CHUNK_OVERHEAD * self.step)))


def has_pictures(spec: ObservationSpec) -> bool:
    """Whether a part has height and width: perception then takes most of an update's memory."""
    return any(len(modality.shape) == 3 for modality in spec.modalities.values())


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of new tensors that are alive at once during a call, scratch space of kernels left out.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000).exp())
        8000
    """
    with _Alive() as alive:
        function()
    return alive.peak


class _Alive(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for output in tree_iter(outputs):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return outputs

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _update(learner: Learner, rows: int, steps: int) -> None:
    model = learner.world_model
    learner.losses(_zeros(model.observation_spec, model.action_spec, rows, steps)).total.backward()
    model.zero_grad()


def _perceive(perception: Perception, steps: int) -> None:
    observations = {name: torch.from_numpy(array) for name, array in perception.spec.zeros(steps).items()}
    latent = perception.latent.sample(perception(observations))
    loss = perception.reconstruction_loss(latent, observations) if perception.latent.decodes else latent
    loss.sum().backward()
    perception.zero_grad()


def _zeros(observation_spec: ObservationSpec, action_spec: ActionSpec, rows: int, steps: int) -> Batch:
    nothing, everything = torch.zeros(rows, steps, dtype=torch.bool), torch.ones(rows, steps, dtype=torch.bool)
    return Batch(
        observation_spec.to_tensors(observation_spec.zeros(rows, steps)),
        torch.from_numpy(action_spec.zeros(rows, steps)),
        torch.zeros(rows, steps),
        terminated=nothing,
        is_last=nothing,
        is_first=nothing,
        valid=everything,
    )

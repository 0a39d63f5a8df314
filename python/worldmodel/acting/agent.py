"""An agent out of a run's folder: what was trained, ready to act in the environment or anywhere else."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.data.batch import State
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.learning.settings import acting_part, saved_config, usable_device
from worldmodel.model.deciders import Decider, greedy_decider
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.run import Run


class Agent:
    """A trained world model that acts, with its memory in the caller's hands.

    The state that ``act`` returns is a dict of tensors: it can be kept, saved, copied and given back at any time, which
    continues from there.

    Args:
        world_model: who decides.
        observation_spec: of what it sees.
        action_spec: of what it does.

    Attributes:
        greedy: the decider that ``act`` uses where none is given.

    Example:
        >>> agent = Agent.load("runs/memory")                                                # doctest: +SKIP
        >>> observation, _ = environment.reset()                                             # doctest: +SKIP
        >>> action, state = agent.act(observation)                                           # doctest: +SKIP
        >>> observation, *_ = environment.step(action)                                       # doctest: +SKIP
        >>> action, state = agent.act(observation, state)                                    # doctest: +SKIP
    """

    def __init__(self, world_model: WorldModel, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        self.world_model = world_model.eval()
        self.observation_spec = observation_spec
        self.action_spec = action_spec
        self.device = next(world_model.parameters()).device
        self.greedy = greedy_decider(world_model)

    @classmethod
    def load(cls, run: Path | str, device: str = "cpu") -> "Agent":
        """The agent of the newest checkpoint in a run's folder, with averaged weights where the run keeps them.

        Args:
            run: the folder.
            device: where it computes.

        Raises:
            RunError: no run, no checkpoint, a damaged file, or weights of another configuration.
            ConfigurationError: a device that PyTorch cannot use, or settings of another version.
        """
        opened = Run(run)
        config = saved_config(opened)
        where = usable_device(device)
        observation_spec = ObservationSpec.from_json(opened.config["spaces"]["observation"])
        action_spec = ActionSpec.from_json(opened.config["spaces"]["action"])
        world_model = WorldModel(observation_spec, action_spec, config.model).to(where)
        opened.load_weights(world_model, where, acting_part(config))
        return cls(world_model, observation_spec, action_spec)

    def init_state(self, batch_size: int = 1) -> State:
        """The memory before anything was seen."""
        return self.world_model.init_state(batch_size)

    @torch.no_grad()
    def act(
        self, observation: Any, state: State | None = None, reset: bool = False, *, decider: Decider | None = None
    ) -> tuple[Any, State]:
        """The action that answers one observation.

        Args:
            observation: as the environment gives it.
            state: what the last call returned; None at the beginning.
            reset: whether an episode begins with this observation; what the state holds is then forgotten.
            decider: chooses the action; the greedy one that the configuration names if None.

        Returns:
            ``(action, state)``: the action as the environment takes it, and the state for the next call.

        Raises:
            ValueError: an observation that holds NaN, or does not fit the space that the agent was trained on.
        """
        encoded = {name: array[None] for name, array in self.observation_spec.encode(observation).items()}
        actions, state = self.act_encoded(encoded, state, np.array([reset]), decider)
        return self.action_spec.to_env(actions)[0], state

    @torch.no_grad()
    def act_encoded(
        self,
        observations: dict[str, np.ndarray],
        state: State | None,
        reset: np.ndarray,
        decider: Decider | None = None,
    ) -> tuple[np.ndarray, State]:
        """The same for a batch of encoded observations, (batch, ...); actions are encoded, too.

        ``ObservationSpec.encode_batch`` makes such observations, ``ActionSpec.to_env`` takes such actions.
        """
        state = self.init_state(len(reset)) if state is None else state
        tensors = self.observation_spec.to_tensors(observations, self.device)
        starts = torch.from_numpy(reset).to(self.device)
        actions, state = self.world_model.act(tensors, state, starts, decider or self.greedy)
        return actions.cpu().numpy(), state

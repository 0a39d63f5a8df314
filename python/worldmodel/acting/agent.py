"""An agent from a run's folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.data.actions import MASK
from worldmodel.data.batch import State, times_of
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.learning.settings import (
    acting_part,
    blocks_of,
    check_weights,
    saved_config,
    saved_specs,
    usable_device,
)
from worldmodel.model.deciders import Decider, action_values, decider_of, greedy_decider
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.run import Run
from worldmodel.runs.trust import check_installed, installed_alone


class Agent:
    """A trained world model; the caller holds its memory state.

    Attributes:
        greedy: the default ``Decider``.

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
    def load(cls, run: Path | str, device: str = "cpu", *, best: bool = False, trust: bool = False) -> "Agent":
        """Loads the newest checkpoint, with averaged weights if there are any.

        Args:
            run: its folder.
            device: as PyTorch names it.
            best: the weights of the best evaluation of training instead.
            trust: import memory blocks that the run names also if their modules are not installed.

        Raises:
            RunError: no run, no such checkpoint, a damaged file, weights of another configuration or with NaN or
                infinity, or a memory block that is not installed, without ``trust``.
            ConfigurationError: an unusable device, settings of another version, or more weights than memory.
        """
        opened = Run.at_best(run) if best else Run(run)
        config = saved_config(opened)
        where = usable_device(device)
        specs = saved_specs(opened)
        if not trust:
            check_installed(opened.folder, blocks_of(config))
        with installed_alone(opened.folder, trust):
            check_weights(opened, config, acting_part(config))
            world_model = WorldModel(*specs, config.model).to(where)
        world_model.chunk_steps = config.chunk_steps
        opened.load_weights(world_model, where, acting_part(config))
        return cls(world_model, *specs)

    def init_state(self, batch_size: int = 1) -> State:
        return self.world_model.init_state(batch_size)

    @torch.no_grad()
    def act(
        self,
        observation: Any,
        state: State | None = None,
        reset: bool = False,
        *,
        decider: Decider | None = None,
        greedy: bool | None = None,
        action_mask: Any = None,
        elapsed: float = 1.0,
    ) -> tuple[Any, State]:
        """Chooses an action, in the environment's form.

        Args:
            observation: in the environment's form.
            state: from the previous call, or None.
            reset: true zeroes the state.
            decider: by default the configured one.
            greedy: deprecated.
            action_mask: legal actions, as ``info["action_mask"]`` of the environment; None if all are, or if the mask
                is a part of the observation.
            elapsed: time since the observation before, in steps, as ``info["elapsed"]`` of the environment.

        Raises:
            ValueError: an observation of another shape, type or range than in training, with NaN, or without a part; a
                mask of another shape or type, or without a legal action.
        """
        mask = None if action_mask is None else self.action_spec.encode_mask(action_mask)
        if mask is not None and not self.action_spec.has_legal(mask):
            raise ValueError(f"Agent.act: {MASK} has no legal action, expected one")
        encoded = {name: array[None] for name, array in self.observation_spec.encode(observation, mask).items()}
        decider = decider_of(decider, greedy, self.greedy)
        masks = None if mask is None else mask[None]
        actions, state = self.act_encoded(
            encoded, state, np.array([reset]), decider, action_masks=masks, elapsed=np.array([elapsed], np.float32)
        )
        return self.action_spec.rows_to_env(actions)[0], state

    @torch.no_grad()
    def act_encoded(
        self,
        observations: dict[str, np.ndarray],
        state: State | None,
        reset: np.ndarray,
        decider: Decider | None = None,
        *,
        greedy: bool | None = None,
        action_masks: np.ndarray | None = None,
        elapsed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, State]:
        """``act`` for encoded observations and actions, (batch, ...); ``reset`` is bool (batch,).

        ``action_masks``, bool (batch, classes), replace those among the observations for the decider. ``elapsed``,
        (batch,), is the time since the observations before, in steps; 1 if None.

        Raises:
            ValueError: observations that are not as ``ObservationSpec.encode`` makes them.
        """
        state = self.init_state(len(reset)) if state is None else state
        checked = self.observation_spec.check(observations, len(reset), "Agent.act_encoded")
        tensors = self.observation_spec.to_tensors(checked, self.device)
        is_first = torch.from_numpy(reset).to(self.device)
        masks = None if action_masks is None else torch.from_numpy(action_masks).to(self.device)
        decider = decider_of(decider, greedy, self.greedy)
        actions, state = self.world_model.act(tensors, state, is_first, decider, masks, times_of(elapsed, self.device))
        return actions.cpu().numpy(), state

    @torch.no_grad()
    def value(self, state: State) -> np.ndarray:
        """Expected discounted return, (batch,), in the environment's units; with exploration, its bonus counts too."""
        return self._in_units(self.world_model.evaluation.value(state["features"]))

    @torch.no_grad()
    def action_values(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Q, (batch, actions), minus infinity for illegal ones, and the actions, in the environment's units and form.

        Raises:
            ValueError: continuous actions, or more than ``DecisionConfig.max_enumerated_actions``.
        """
        if not self.world_model.decision.is_enumerable:
            most = self.world_model.config.decision.max_enumerated_actions
            raise ValueError(
                f"Agent.action_values: actions are {self.action_spec}, expected at most {most} discrete ones"
            )
        q, actions = action_values(self.world_model, state)
        return self._in_units(q), self.action_spec.to_env(self.action_spec.decode(actions).cpu().numpy())

    @torch.no_grad()
    def imagined_rewards(self, state: State, actions: np.ndarray) -> np.ndarray:
        """``actions`` (batch, horizon, *ActionSpec.shape) -> (batch, horizon), in the environment's units."""
        encoded = self.action_spec.encode(torch.from_numpy(actions).to(self.device))
        mode = self.world_model.perception.latent.mode
        return self._in_units(self.world_model.imagine_actions(state, encoded, mode).rewards)

    def _in_units(self, scaled: torch.Tensor) -> np.ndarray:
        return (scaled * self.world_model.reward_scale.scale.to(scaled.dtype)).cpu().numpy()

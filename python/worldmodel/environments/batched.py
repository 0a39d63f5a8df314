"""Gymnasium's vector environments, which can only be saved as a pickle (``pickle_io.py``)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from worldmodel.data.actions import MASK, ActionSpec
from worldmodel.data.spaces import ObservationSpec
from worldmodel.environments import calls, pickle_io
from worldmodel.environments.masks import MaskReader, masks_of
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.vector import Transitions, random_seeds
from worldmodel.runs.optional_dependencies import require

if TYPE_CHECKING:
    import gymnasium


class GymnasiumVectorEnvironment:
    """A gymnasium vector environment, as ``VectorEnvironment``; ``seed`` is for the first episodes."""

    def __init__(
        self,
        envs: "gymnasium.vector.VectorEnv[Any, Any, Any]",
        seed: int,
        pickle: bool = False,
        kinds: Mapping[str, str] | ObservationSpec | None = None,
        image_size: int | None = None,
    ) -> None:
        self.envs = envs
        self.pickle = pickle
        self._seed = seed
        self.name = envs.spec.id if envs.spec else type(envs.unwrapped).__name__
        self.num_envs = envs.num_envs
        begun = envs.reset(seed=seed)
        self.action_spec = ActionSpec.from_space(envs.single_action_space)
        self.observation_spec = ObservationSpec.from_space(
            envs.single_observation_space, kinds, lambda: begun[0], self.action_spec, begun[1], image_size
        )
        self._masks = MaskReader(self.observation_spec, self.action_spec, not isinstance(kinds, ObservationSpec))
        modes = require("gymnasium.vector", "run environments").AutoresetMode
        self._mode = modes(envs.metadata.get("autoreset_mode", modes.NEXT_STEP))
        self._modes = modes
        self._restart(*begun)

    def _restart(self, raw: Any, info: Mapping[str, Any]) -> None:
        self._ignored = np.zeros(self.num_envs, bool)  # the next action only resets
        self.is_first = np.ones(self.num_envs, bool)
        self.elapsed = np.ones(self.num_envs, np.float32)
        self.observations = self._encode(raw, info, np.zeros(self.num_envs, bool))

    def step(self, actions: np.ndarray) -> Transitions:
        """With ``NEXT_STEP``, the step after an episode's end only resets: no transition."""
        try:
            raw, rewards, terminated, truncated, info = self.envs.step(self.action_spec.to_env(actions))
            rewards = np.asarray(rewards, np.float32).reshape(self.num_envs)
        except Exception as error:
            raise EnvironmentFailed(f"{self.name}: {calls.told(error)}") from error
        ended = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        same_step = self._mode is self._modes.SAME_STEP
        following = self._encode(raw, info, np.zeros_like(ended) if same_step else ended)
        rows = np.flatnonzero(~self._ignored)
        last = {name: array.copy() for name, array in following.items()}
        elapsed = self._elapsed_of(info, ended if same_step else None)
        if self._mode is self._modes.NEXT_STEP:
            self.is_first = self._ignored
            self._ignored = ended & ~self._ignored
        else:
            self.is_first = ended
            if same_step:
                self._replace_ended(last, info, ended)
            elif ended.any():
                following = self._encode(*self.envs.reset(options={"reset_mask": ended}), ~ended)
                if self.observation_spec.action_mask == "info":  # only of those that were reset
                    following[MASK][~ended] = last[MASK][~ended]
        self.observations = following
        self.elapsed = np.where(self.is_first, 1, elapsed).astype(np.float32)
        return Transitions(
            rows,
            _finite_rewards(self.name, rewards[rows]),
            np.asarray(terminated, bool)[rows],
            np.asarray(truncated, bool)[rows],
            {name: array[rows] for name, array in last.items()},
            elapsed[rows],
        )

    def _elapsed_of(self, info: Mapping[str, Any], ended: np.ndarray | None) -> np.ndarray:
        """Time to each last observation, in steps, (num_envs,); that of ``ended`` episodes is in ``final_info``."""
        found = np.ones(self.num_envs, np.float32)
        parts = [(info, None)] if ended is None else [(info, ~ended), (info.get("final_info", {}), ended)]
        for part, chosen in parts:
            if calls.ELAPSED in part:
                given = np.asarray(part.get(f"_{calls.ELAPSED}", np.ones(self.num_envs, bool)))
                for row in np.flatnonzero(given if chosen is None else given & chosen):
                    try:
                        found[row] = calls.elapsed(part[calls.ELAPSED][row])
                    except calls.Misbehaviour as error:
                        raise EnvironmentFailed(f"{self.name}: {error}") from error
        return found

    def _replace_ended(self, last: dict[str, np.ndarray], info: Mapping[str, Any], ended: np.ndarray) -> None:
        """Puts the ended episodes' last observations into ``last``."""
        try:
            masks = self._masks.encode_masks(masks_of(info.get("final_info", {}), self.num_envs))
            for row in np.flatnonzero(ended):
                mask = None if masks is None else masks[row]
                for name, value in self.observation_spec.encode(info["final_obs"][row], mask).items():
                    last[name][row] = value
        except (ValueError, TypeError) as error:
            raise EnvironmentFailed(f"{self.name}: {error}") from error

    def _encode(self, raw: Any, info: Mapping[str, Any], ended: np.ndarray) -> dict[str, np.ndarray]:
        try:
            encoded = self._masks.encode(raw, masks_of(info, self.num_envs), ended)
            return {name: array.copy() for name, array in encoded.items()}
        except (ValueError, TypeError) as error:
            raise EnvironmentFailed(f"{self.name}: {error}") from error

    def close(self) -> None:
        self.envs.close()

    def state_dict(self) -> dict[str, Any] | None:
        """None without ``pickle``."""
        if not self.pickle:
            return None
        return {
            "pickle": pickle_io.dump(self.envs, self.name),
            "ignored": self._ignored,
            "reset": self.is_first,
            "elapsed": self.elapsed,
            "observations": self.observations,
        }

    def load_state_dict(self, saved: Mapping[str, Any] | None, *, unpickle: bool = False) -> None:
        """Raises EnvironmentFailed without a pickle, PickleRefused without ``unpickle``."""
        if saved is None:
            raise EnvironmentFailed(
                f"{self.name} is a vector environment of its own, whose episodes cannot be played again from a seed"
            )
        envs = pickle_io.load(saved["pickle"], self.name, unpickle)
        self.close()
        self.envs = envs
        self._ignored, self.is_first = saved["ignored"].copy(), saved["reset"].copy()
        self.elapsed = saved.get("elapsed", np.ones(self.num_envs, np.float32)).copy()
        self.observations = {name: array.copy() for name, array in saved["observations"].items()}

    def begin_anew(self, saved: Mapping[str, Any] | None, steps: int) -> None:
        self._restart(*self.envs.reset(seed=random_seeds(self._seed)(steps)))


def _finite_rewards(name: str, rewards: np.ndarray) -> np.ndarray:
    if not np.isfinite(rewards).all():
        raise EnvironmentFailed(f"{name}: a reward is NaN or infinite: {rewards}")
    return rewards

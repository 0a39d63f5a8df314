"""Vector environments.

``VectorEnvironment`` seeds every episode, so seeds and actions are its saved state. ``GymnasiumVectorEnvironment``
can only be pickled (``pickle_io.py``).
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments import pickle_io
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.runs.optional_dependencies import require

if TYPE_CHECKING:
    import gymnasium


@dataclasses.dataclass
class Transitions:
    """Transitions of n environments; n may be below ``num_envs``.

    Attributes:
        rows: int (n,), environments.
        rewards: float32 (n,).
        terminated: bool (n,).
        truncated: bool (n,).
        next_observations: name -> (n, ...), even where the episode ended.
    """

    rows: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_observations: dict[str, np.ndarray]


def random_seeds(seed: int) -> Callable[[int], int]:
    """A function from episode id to random seed."""
    return lambda episode: int(np.random.SeedSequence((seed, episode)).generate_state(1)[0] >> 1)


class VectorEnvironment:
    """Single environments, stepped one by one; ``seed_of`` maps episode id to seed, ``kinds`` is for ``from_space``.

    Attributes:
        observations: by modality, (num_envs, ...).
        is_first: bool (num_envs,), whether ``observations`` begin an episode.
        episode_ids: of the running episodes.

    Raises:
        ValueError: an unsupported space.
        EnvironmentFailed: an environment raised an error, or returned NaN.
    """

    def __init__(
        self,
        environments: "Sequence[gymnasium.Env[Any, Any]]",
        seed_of: Callable[[int], int],
        observation_spec: ObservationSpec | None = None,
        action_spec: ActionSpec | None = None,
        pickle: bool = False,
        kinds: Mapping[str, str] | ObservationSpec | None = None,
    ) -> None:
        self.environments = list(environments)
        first = self.environments[0]
        self.name = first.spec.id if first.spec else type(first.unwrapped).__name__
        self._seed_of = seed_of
        self.observation_spec = observation_spec or ObservationSpec.from_space(
            first.observation_space, kinds, self._example
        )
        self.action_spec = action_spec or ActionSpec.from_space(first.action_space)
        self.num_envs = len(self.environments)
        self.pickle = pickle
        self._utils = require("gymnasium.vector.utils", "run environments")
        self._space = first.observation_space
        self._begun = 0
        self.episode_ids, self.seeds = [0] * self.num_envs, [0] * self.num_envs
        self._actions: list[list[np.ndarray]] = [[] for _ in range(self.num_envs)]  # per running episode
        self._checksums = [0] * self.num_envs
        self._restart()

    def _example(self) -> Any:
        """The first observation, which begins again afterwards."""
        try:
            return self.environments[0].reset(seed=self._seed_of(0))[0]
        except Exception as error:
            raise EnvironmentFailed(f"{self.name}, reset 0: {error}") from error

    def _restart(self) -> None:
        self.is_first = np.ones(self.num_envs, bool)
        self.observations = self._begin(range(self.num_envs))

    def restart(self, rows: np.ndarray) -> None:
        """Begins new episodes in ``rows``, int (n,), in place of those that run."""
        self.is_first[rows] = True
        for name, array in self._begin(rows.tolist()).items():
            self.observations[name][rows] = array

    def step(self, actions: np.ndarray) -> Transitions:
        """Steps with actions (num_envs, *action_spec.shape), and resets where an episode ended."""
        results = [self._act(row, action) for row, action in enumerate(self.action_spec.to_env(actions))]
        raw, rewards, terminated, truncated = zip(*results, strict=True)
        following = self._encode(list(raw), range(self.num_envs))
        transitions = Transitions(
            np.arange(self.num_envs),
            _finite_rewards(self.name, np.asarray(rewards, np.float32)),
            np.asarray(terminated, bool),
            np.asarray(truncated, bool),
            following,
        )
        for row in range(self.num_envs):
            self._check(row, following, row, transitions.rewards[row])
        self.is_first = transitions.terminated | transitions.truncated
        self.observations = {name: array.copy() for name, array in following.items()}
        ended = np.flatnonzero(self.is_first)
        if ended.size:
            for name, array in self._begin(ended.tolist()).items():
                self.observations[name][ended] = array
        return transitions

    def _act(self, row: int, action: Any) -> tuple[Any, float, bool, bool]:
        self._actions[row].append(action)
        try:
            observation, reward, terminated, truncated, _ = self.environments[row].step(action)
        except Exception as error:
            raise self._failed(row, "step", error) from error
        return observation, float(reward), terminated, truncated

    def _begin(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        first = []
        for row in rows:
            self.episode_ids[row], self.seeds[row] = self._begun, self._seed_of(self._begun)
            self._begun += 1
            first.append(self._reset(row))
        encoded = self._encode(first, rows)
        for index, row in enumerate(rows):
            self._check(row, encoded, index)
        return encoded

    def _reset(self, row: int) -> Any:
        self._actions[row], self._checksums[row] = [], 0
        try:
            return self.environments[row].reset(seed=self.seeds[row])[0]
        except Exception as error:
            raise self._failed(row, "reset", error) from error

    def _check(self, row: int, encoded: Mapping[str, np.ndarray], index: int, reward: float = 0.0) -> None:
        checksum = zlib.crc32(np.float32(reward).tobytes(), self._checksums[row])
        for array in encoded.values():
            checksum = zlib.crc32(array[index].tobytes(), checksum)
        self._checksums[row] = checksum

    def _encode(self, raw: list[Any], rows: Sequence[int]) -> dict[str, np.ndarray]:
        try:
            empty = self._utils.create_empty_array(self._space, n=len(raw), fn=np.zeros)
            return self.observation_spec.encode_batch(self._utils.concatenate(self._space, raw, empty))
        except (ValueError, TypeError) as error:
            raise self._failed(rows[0], "observation", error) from error

    def _failed(self, row: int, where: str, error: Exception) -> EnvironmentFailed:
        step = len(self._actions[row])
        return EnvironmentFailed(f"{self.name}, {where} {step} of the episode with seed {self.seeds[row]}: {error}")

    def close(self) -> None:
        for environment in self.environments:
            environment.close()

    def state_dict(self) -> dict[str, Any]:
        """Seeds, actions and observations, and any pickle. Raises EnvironmentFailed."""
        return {
            "begun": self._begun,
            "episode_ids": list(self.episode_ids),
            "seeds": list(self.seeds),
            "actions": [np.array(actions) for actions in self._actions],
            "checksums": list(self._checksums),
            "observations": self.observations,
            "reset": self.is_first,
            "pickle": pickle_io.dump(self.environments, self.name) if self.pickle else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, unpickle: bool = False) -> None:
        """Replays episodes, or executes the pickle if ``unpickle`` allows it.

        Raises:
            EnvironmentFailed: an environment is not deterministic given its seed.
            PickleRefused: ``unpickle`` is false.
        """
        self._begun, self.episode_ids, self.seeds = saved["begun"], list(saved["episode_ids"]), list(saved["seeds"])
        if saved["pickle"] is not None:
            environments = pickle_io.load(saved["pickle"], self.name, unpickle)
            self.close()
            self.environments = environments
            self._actions = [list(actions) for actions in saved["actions"]]
            self._checksums = list(saved["checksums"])
        else:
            for row, (actions, checksum) in enumerate(zip(saved["actions"], saved["checksums"], strict=True)):
                self._repeat(row, actions, checksum)
        self.observations = {name: array.copy() for name, array in saved["observations"].items()}
        self.is_first = saved["reset"].copy()

    def _repeat(self, row: int, actions: np.ndarray, checksum: int) -> None:
        self._check(row, self._encode([self._reset(row)], [row]), 0)
        for action in actions:
            observation, reward, *_ = self._act(row, action)
            self._check(row, self._encode([observation], [row]), 0, reward)
        if self._checksums[row] != checksum:
            raise EnvironmentFailed(
                f"{self.name} does not repeat itself: the {len(actions)} actions since seed {self.seeds[row]}, done "
                "again, lead to other observations or rewards than the first time"
            )

    def begin_anew(self, saved: Mapping[str, Any] | None, steps: int) -> None:
        """Begins episodes with other seeds than ``saved``, made after ``steps`` transitions."""
        if saved is not None:
            self._begun = saved["begun"]
        self._restart()


class GymnasiumVectorEnvironment:
    """A gymnasium vector environment, as ``VectorEnvironment``; ``seed`` is for the first episodes."""

    def __init__(
        self,
        envs: "gymnasium.vector.VectorEnv[Any, Any, Any]",
        seed: int,
        pickle: bool = False,
        kinds: Mapping[str, str] | ObservationSpec | None = None,
    ) -> None:
        self.envs = envs
        self.pickle = pickle
        self._seed = seed
        self.name = envs.spec.id if envs.spec else type(envs.unwrapped).__name__
        self.num_envs = envs.num_envs
        self.observation_spec = ObservationSpec.from_space(
            envs.single_observation_space, kinds, lambda: envs.reset(seed=seed)[0]
        )
        self.action_spec = ActionSpec.from_space(envs.single_action_space)
        modes = require("gymnasium.vector", "run environments").AutoresetMode
        self._mode = modes(envs.metadata.get("autoreset_mode", modes.NEXT_STEP))
        self._modes = modes
        self._restart(seed)

    def _restart(self, seed: int) -> None:
        self._ignored = np.zeros(self.num_envs, bool)  # the next action only resets
        self.is_first = np.ones(self.num_envs, bool)
        self.observations = self._encode(self.envs.reset(seed=seed)[0])

    def step(self, actions: np.ndarray) -> Transitions:
        """With ``NEXT_STEP``, the step after an episode's end only resets: no transition."""
        try:
            raw, rewards, terminated, truncated, info = self.envs.step(self.action_spec.to_env(actions))
        except Exception as error:
            raise EnvironmentFailed(f"{self.name}: {error}") from error
        following = self._encode(raw)
        ended = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        rows = np.flatnonzero(~self._ignored)
        last = {name: array.copy() for name, array in following.items()}
        if self._mode is self._modes.NEXT_STEP:
            self.is_first = self._ignored
            self._ignored = ended & ~self._ignored
        else:
            self.is_first = ended
            if self._mode is self._modes.SAME_STEP:
                for row in np.flatnonzero(ended):
                    for name, value in self.observation_spec.encode(info["final_obs"][row]).items():
                        last[name][row] = value
            elif ended.any():
                following = self._encode(self.envs.reset(options={"reset_mask": ended})[0])
        self.observations = following
        return Transitions(
            rows,
            _finite_rewards(self.name, np.asarray(rewards, np.float32)[rows]),
            np.asarray(terminated, bool)[rows],
            np.asarray(truncated, bool)[rows],
            {name: array[rows] for name, array in last.items()},
        )

    def _encode(self, raw: Any) -> dict[str, np.ndarray]:
        try:
            return {name: array.copy() for name, array in self.observation_spec.encode_batch(raw).items()}
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
        self.observations = {name: array.copy() for name, array in saved["observations"].items()}

    def begin_anew(self, saved: Mapping[str, Any] | None, steps: int) -> None:
        self._restart(random_seeds(self._seed)(steps))


def _finite_rewards(name: str, rewards: np.ndarray) -> np.ndarray:
    if not np.isfinite(rewards).all():
        raise EnvironmentFailed(f"{name}: a reward is NaN or infinite: {rewards}")
    return rewards

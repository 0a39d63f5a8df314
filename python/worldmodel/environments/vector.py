"""Single environments together.

Every episode is seeded, so seeds and actions are the saved state.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worldmodel.data.actions import MASK
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments import calls, pickle_io
from worldmodel.environments.masks import MaskReader
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.optional_dependencies import require

if TYPE_CHECKING:
    import gymnasium

_MOST_RESETS = 10  # with errors, one after the other


@dataclasses.dataclass
class Transitions:
    """Transitions of n environments; n may be below ``num_envs``.

    Attributes:
        rows: int (n,), environments.
        rewards: float32 (n,).
        terminated: bool (n,).
        truncated: bool (n,).
        next_observations: name -> (n, ...), even where the episode ended.
        elapsed: float32 (n,), time to ``next_observations``, in steps.
    """

    rows: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_observations: dict[str, np.ndarray]
    elapsed: np.ndarray


@dataclasses.dataclass
class _Raw:
    """What an environment returned; ``mask`` is info's, or None."""

    observation: Any
    mask: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    elapsed: float = 1.0


def random_seeds(seed: int) -> Callable[[int], int]:
    """A function from episode id to random seed."""
    return lambda episode: int(np.random.SeedSequence((seed, episode)).generate_state(1)[0] >> 1)


class VectorEnvironment:
    """Single environments, stepped one by one.

    ``seed_of`` maps episode id to seed; ``kinds`` and ``image_size`` are for ``ObservationSpec.from_space``.

    If ``tolerant``, first resets that fail are in ``failed``; ``observation_spec`` must be given then.

    Attributes:
        observations: by modality, (num_envs, ...).
        is_first: bool (num_envs,), whether ``observations`` begin an episode.
        elapsed: float32 (num_envs,), time since the observations before, ``info["elapsed"]`` of the environment or 1.
        episode_ids: of the running episodes.
        failures: episodes that ended with an error.
        failed: environments whose episode did, and no other has begun; they are not stepped.
        errors: environment -> its newest error, in a line.
        begun: episodes.

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
        tolerant: bool = False,
        image_size: int | None = None,
    ) -> None:
        self.environments = list(environments)
        if len({id(environment.unwrapped) for environment in self.environments}) < len(self.environments):
            raise ConfigurationError(
                f"{len(self.environments)} environments are wanted, and what makes them gave the same one twice: "
                "expected one of its own each time"
            )
        first = self.environments[0]
        self.name = first.spec.id if first.spec else type(first.unwrapped).__name__
        self._seed_of = seed_of
        self.action_spec = action_spec or ActionSpec.from_space(first.action_space)
        self.num_envs = len(self.environments)
        self.pickle = pickle
        self._utils = require("gymnasium.vector.utils", "run environments")
        self._space = first.observation_space
        self.begun = 0
        self.failures = 0
        self.failed: set[int] = set()
        self.errors: dict[int, str] = {}
        self.episode_ids, self.seeds = [0] * self.num_envs, [0] * self.num_envs
        self._actions: list[list[np.ndarray]] = [[] for _ in range(self.num_envs)]  # per running episode
        self._checksums = [0] * self.num_envs
        self._wanted = observation_spec, kinds, image_size
        self._masks: MaskReader | None = None
        if tolerant:
            self._masks = self._choose_spec([])
            self.observations = self.observation_spec.zeros(self.num_envs)
            self.is_first = np.ones(self.num_envs, bool)
            self.elapsed = np.ones(self.num_envs, np.float32)
            self.begin(range(self.num_envs))
        else:
            self._restart()

    def _restart(self) -> None:
        self.is_first = np.ones(self.num_envs, bool)
        self.elapsed = np.ones(self.num_envs, np.float32)
        begun = self._resets(range(self.num_envs))
        if self._masks is None:
            self._masks = self._choose_spec(begun)
        self.observations = self._encode_begun(begun, range(self.num_envs))

    def _choose_spec(self, begun: list[_Raw]) -> MaskReader:
        given, kinds, image_size = self._wanted
        info = {MASK: True} if any(result.mask is not None for result in begun) else {}
        self.observation_spec = given or ObservationSpec.from_space(
            self._space, kinds, lambda: begun[0].observation, self.action_spec, info, image_size
        )
        new = given is None and not isinstance(kinds, ObservationSpec)
        return MaskReader(self.observation_spec, self.action_spec, new)

    def restart(self, rows: np.ndarray) -> None:
        """Begins new episodes in ``rows``, int (n,), in place of those that run."""
        self.is_first[rows], self.elapsed[rows] = True, 1
        for name, array in self._begin(rows.tolist()).items():
            self.observations[name][rows] = array

    def begin(self, rows: Sequence[int]) -> None:
        """Begins new episodes in ``rows``; those whose reset fails are in ``failed``."""
        for row in rows:
            with self._failing(row, []):
                self.restart(np.array([row]))
                self.failed.discard(row)

    def step(self, actions: np.ndarray) -> Transitions:
        """Steps with actions (num_envs, *action_spec.shape), and resets where an episode ended.

        Raises:
            EnvironmentFailed: an environment failed; the others have stepped, and a state saved now begins another
                episode in its place.
        """
        failures: list[EnvironmentFailed] = []
        results: dict[int, _Raw] = {}
        for row, (action, given) in enumerate(zip(actions, self.action_spec.rows_to_env(actions), strict=True)):
            if row not in self.failed:
                with self._failing(row, failures):
                    results[row] = self._act(row, action if self.action_spec.parts else given, given)
        following = self._encode_those(results, failures)
        rows = np.array(list(results), np.int64)
        transitions = Transitions(
            rows,
            np.array([result.reward for result in results.values()], np.float32),
            np.array([result.terminated for result in results.values()], bool),
            np.array([result.truncated for result in results.values()], bool),
            following,
            np.array([result.elapsed for result in results.values()], np.float32),
        )
        for index, row in enumerate(results):
            self._check(row, following, index, transitions.rewards[index])
        self.is_first = np.ones(self.num_envs, bool)
        self.is_first[rows] = transitions.terminated | transitions.truncated
        self.elapsed = np.ones(self.num_envs, np.float32)
        self.elapsed[rows] = np.where(self.is_first[rows], 1, transitions.elapsed)
        for name, array in following.items():
            self.observations[name] = self.observations[name].copy()
            self.observations[name][rows] = array
        for row in rows[self.is_first[rows]].tolist():
            with self._failing(row, failures):
                for name, array in self._begin([row]).items():
                    self.observations[name][row] = array[0]
        if failures:
            failures[0].happened = transitions
            raise failures[0]
        return transitions

    @contextlib.contextmanager
    def _failing(self, row: int, failures: list[EnvironmentFailed]) -> Iterator[None]:
        try:
            yield
        except EnvironmentFailed as failure:
            failures.append(failure)
            self.failures += 1
            self.failed.add(row)
            self.errors[row] = str(failure)

    def _encode_those(self, results: dict[int, _Raw], failures: list[EnvironmentFailed]) -> dict[str, np.ndarray]:
        """The observations in ``results``, by row; takes out those that cannot be encoded."""
        if results:
            try:
                return self._encode(list(results.values()), list(results))
            except EnvironmentFailed:
                count = len(results)
                for row in list(results):
                    with self._failing(row, failures):
                        self._encode([results[row]], [row])
                    if row in self.failed:
                        del results[row]
                if len(results) == count:
                    raise
        return self._encode_those(results, failures) if results else self.observation_spec.zeros(0)

    def _act(self, row: int, action: Any, given: Any) -> _Raw:
        """Steps with ``given`` and keeps ``action``: the same, or in the spec's form for a Tuple or Dict."""
        self._actions[row].append(np.array(action))  # the environment may change its own
        try:
            observation, reward, terminated, truncated, mask, elapsed = calls.step(self.environments[row], given)
        except Exception as error:
            raise self._failed(row, "step", error) from error
        return _Raw(observation, mask, reward, terminated, truncated, elapsed)

    def _begin(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        return self._encode_begun(self._resets(rows), rows)

    def _encode_begun(self, begun: list[_Raw], rows: Sequence[int]) -> dict[str, np.ndarray]:
        encoded = self._encode(begun, rows)
        for index, row in enumerate(rows):
            self._check(row, encoded, index)
        return encoded

    def _resets(self, rows: Sequence[int]) -> list[_Raw]:
        begun = []
        for row in rows:
            self.episode_ids[row], self.seeds[row] = self.begun, self._seed_of(self.begun)
            self.begun += 1
            begun.append(self._reset(row))
        return begun

    def _reset(self, row: int) -> _Raw:
        self._actions[row], self._checksums[row] = [], 0
        try:
            return _Raw(*calls.reset(self.environments[row], self.seeds[row]))
        except Exception as error:
            raise self._failed(row, "reset", error) from error

    def _check(self, row: int, encoded: Mapping[str, np.ndarray], index: int, reward: float = 0.0) -> None:
        checksum = zlib.crc32(np.float32(reward).tobytes(), self._checksums[row])
        for array in encoded.values():
            checksum = zlib.crc32(array[index].tobytes(), checksum)
        self._checksums[row] = checksum

    def _encode(self, raw: list[_Raw], rows: Sequence[int]) -> dict[str, np.ndarray]:
        try:
            empty = self._utils.create_empty_array(self._space, n=len(raw), fn=np.zeros)
            joined = self._utils.concatenate(self._space, [result.observation for result in raw], empty)
            ended = np.array([result.terminated or result.truncated for result in raw])
            assert self._masks is not None
            return self._masks.encode(joined, [result.mask for result in raw], ended)
        except (ValueError, TypeError) as error:
            raise self._failed(rows[0], "observation", error) from error

    def _failed(self, row: int, where: str, error: Exception) -> EnvironmentFailed:
        step = len(self._actions[row])
        said = str(error) if where == "observation" else calls.told(error)
        return EnvironmentFailed(f"{self.name}, {where} {step} of the episode with seed {self.seeds[row]}: {said}")

    def close(self) -> None:
        for environment in self.environments:
            environment.close()

    def state_dict(self) -> dict[str, Any]:
        """Seeds, actions and observations, and any pickle. Raises EnvironmentFailed."""
        return {
            "begun": self.begun,
            "episode_ids": list(self.episode_ids),
            "seeds": list(self.seeds),
            "actions": [np.array(actions) for actions in self._actions],
            "checksums": list(self._checksums),
            "observations": self.observations,
            "reset": self.is_first,
            "elapsed": self.elapsed,
            "failures": self.failures,
            "failed": sorted(self.failed),
            "pickle": pickle_io.dump(self.environments, self.name) if self.pickle else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, unpickle: bool = False) -> None:
        """Replays episodes, or executes the pickle if ``unpickle`` allows it; others begin where episodes had failed.

        Raises:
            EnvironmentFailed: an environment is not deterministic given its seed.
            PickleRefused: ``unpickle`` is false.
        """
        self.begun, self.episode_ids, self.seeds = saved["begun"], list(saved["episode_ids"]), list(saved["seeds"])
        if saved["pickle"] is not None:
            environments = pickle_io.load(saved["pickle"], self.name, unpickle)
            self.close()
            self.environments = environments
            self._actions = [list(actions) for actions in saved["actions"]]
            self._checksums = list(saved["checksums"])
        else:
            for row, (actions, checksum) in enumerate(zip(saved["actions"], saved["checksums"], strict=True)):
                if row not in saved.get("failed", ()):
                    self._repeat(row, actions, checksum)
        self.observations = {name: array.copy() for name, array in saved["observations"].items()}
        self.is_first = saved["reset"].copy()
        self.elapsed = saved.get("elapsed", np.ones(self.num_envs, np.float32)).copy()
        self.failures = saved.get("failures", 0)
        for row in saved.get("failed", ()):
            self._begin_after_failure(row)

    def _begin_after_failure(self, row: int) -> None:
        """Begins an episode in ``row``; episodes that fail at once are counted and left out."""
        for remaining in reversed(range(_MOST_RESETS)):
            try:
                self.restart(np.array([row]))
                break
            except EnvironmentFailed:
                self.failures += 1
                if not remaining:
                    raise
        self.failed.discard(row)

    def _repeat(self, row: int, actions: np.ndarray, checksum: int) -> None:
        self._check(row, self._encode([self._reset(row)], [row]), 0)
        for action in actions:
            given = self.action_spec.rows_to_env(action[None])[0] if self.action_spec.parts else action.copy()
            result = self._act(row, action, given)
            self._check(row, self._encode([result], [row]), 0, result.reward)
        if self._checksums[row] != checksum:
            raise EnvironmentFailed(
                f"{self.name} does not repeat itself: the {len(actions)} actions since seed {self.seeds[row]}, done "
                "again, lead to other observations or rewards than the first time"
            )

    def begin_anew(self, saved: Mapping[str, Any] | None, steps: int) -> None:
        """Begins episodes with other seeds than ``saved``, made after ``steps`` transitions."""
        if saved is not None:
            self.begun = saved["begun"]
            self.failures = saved.get("failures", 0)
        self._restart()

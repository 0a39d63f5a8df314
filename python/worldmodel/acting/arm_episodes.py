"""Episodes of arms, many at once: demonstrations of the expert in a file, and those of a policy."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from worldmodel.data.datasets import EpisodeFile, EpisodeWriter
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.arm.expert import Expert, perturbed
from worldmodel.environments.arm.game import Arm, observed
from worldmodel.environments.arm.worlds import TASKS, ArmConfig, ArmWorlds
from worldmodel.model.imitation import ImitationPolicy
from worldmodel.runs.fields import ConfigurationError

LENGTH = 100  # steps of an episode
_SHORT = 20  # steps of a short one
Actor = Callable[[ArmWorlds], np.ndarray]
"""Worlds, from the start of their episodes on -> actions (batch, 4)."""


@dataclasses.dataclass(frozen=True)
class Performed:
    """Episodes of arms.

    Attributes:
        first: steps until the first success, ``steps + 1`` without one: int64 (batch,).
        steps: that there were at most.
    """

    first: np.ndarray
    steps: int

    @property
    def success(self) -> np.ndarray:
        """Whether there was one, bool (batch,)."""
        return self.first <= self.steps


def perform(
    worlds: ArmWorlds, actor: Actor, steps: int = LENGTH, watch: Callable[[ArmWorlds], None] | None = None
) -> Performed:
    """Episodes from the worlds' start, until each had its first success; ``watch`` is called before each step.

    Example:
        >>> random = np.random.default_rng(0)
        >>> worlds = ArmWorlds(20, ArmConfig(task="pick"), random)
        >>> float(perform(worlds, expert_actor(worlds, random)).success.mean())
        1.0
    """
    first = np.full(worlds.batch, steps + 1)
    for step in range(1, steps + 1):
        if watch is not None:
            watch(worlds)
        success = worlds.step(actor(worlds))
        first = np.where(success, np.minimum(first, step), first)
        if (first <= step).all():
            break
    return Performed(first, steps)


class PolicyActor:
    """A policy as an actor; its memory begins anew in worlds that it did not see before.

    Args:
        policy: trained on demonstrations of such arms.
        temperature: of ``ImitationPolicy.act``.

    Raises:
        ConfigurationError: worlds that are observed otherwise than the demonstrations were.
    """

    def __init__(self, policy: ImitationPolicy, temperature: float = 0.0) -> None:
        self.policy, self.temperature = policy, temperature
        self._worlds: ArmWorlds | None = None

    def __call__(self, worlds: ArmWorlds) -> np.ndarray:
        if worlds is not self._worlds:
            observation_spec, action_spec = arm_specs(worlds.config)
            changed = self.policy.observation_spec.differences(observation_spec)
            if changed or self.policy.action_spec != action_spec:
                said = changed[0] if changed else f"actions {self.policy.action_spec}"
                raise ConfigurationError(f"the policy learned from other episodes than the arm's: {said}")
            self._worlds, self._spec = worlds, observation_spec
            self._state = self.policy.init_state(worlds.batch)
        device, found = next(self.policy.parameters()).device, self._spec.encode_batch(observed(worlds))
        seen = {name: torch.from_numpy(array).to(device) for name, array in found.items()}
        actions, self._state = self.policy.act(seen, self._state, temperature=self.temperature)
        return actions.cpu().numpy()


def success_by_task(
    make_actor: Callable[[str, ArmWorlds], Actor],
    config: ArmConfig,
    episodes: int,
    *,
    seed: int,
    steps: int = LENGTH,
    tasks: Sequence[str] = TASKS,
) -> dict[str, Performed]:
    """``episodes`` of each of ``tasks``.

    Args:
        make_actor: called with a task and its worlds.
        config: of the arms; the task is replaced.
        episodes: per task.
        seed: of the tables.
        steps: of an episode, at most.
        tasks: to perform.

    Example:
        >>> random = np.random.default_rng(0)
        >>> found = success_by_task(lambda task, worlds: expert_actor(worlds, random), ArmConfig(), 10, seed=1)
        >>> {task: float(performed.success.mean()) for task, performed in found.items()}
        {'pick': 1.0, 'push': 1.0, 'stack': 1.0, 'wipe': 1.0}
    """
    found = {}
    for task in tasks:
        own = dataclasses.replace(config, task=task)  # type: ignore[arg-type]
        worlds = ArmWorlds(episodes, own, np.random.default_rng(seed))
        found[task] = perform(worlds, make_actor(task, worlds), steps)
    return found


def expert_actor(worlds: ArmWorlds, random: np.random.Generator) -> Actor:
    """The expert of ``worlds``, which are as they were made."""
    expert = Expert(worlds, random)
    return lambda _: expert.act()


def random_actor(random: np.random.Generator) -> Actor:
    """Uniform actions."""
    return lambda worlds: random.uniform(-1, 1, (worlds.batch, 4))


def mean_command_actor(file: EpisodeFile, task: str) -> Actor:
    """At each step the mean of what was done at it in the demonstrations of ``task``, whatever is observed.

    After the longest demonstration, nothing moves.

    Raises:
        ConfigurationError: no demonstration of ``task``.
    """
    starts, lengths = file.episode_starts, np.diff(np.append(file.episode_starts, file.steps)) - 1
    of_task = file.arrays["observations/task"][starts, 0] == TASKS.index(task)
    if not of_task.any():
        raise ConfigurationError(f"{file.path} has no demonstration of {task!r}, expected one at least")
    starts, lengths = starts[of_task], lengths[of_task]
    means = [file.arrays["actions"][starts[lengths > step] + step].mean(0) for step in range(lengths.max())]
    left = iter(means)
    return lambda worlds: np.tile(next(left, np.zeros(4)), (worlds.batch, 1))


def arm_specs(config: ArmConfig) -> tuple[ObservationSpec, ActionSpec]:
    """Of ``worldmodel/Arm-v0``."""
    arm = Arm(**vars(config))
    return ObservationSpec.from_space(arm.observation_space), ActionSpec.from_space(arm.action_space)


def record_demonstrations(
    path: Path,
    episodes: int | None,
    config: ArmConfig,
    *,
    noise: float = 0.3,
    seed: int = 0,
    batch: int = 100,
    steps: int | None = None,
    length: int = LENGTH,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Records ``episodes`` of the expert that succeed, in the layout of ``data/datasets.py``; returns their steps.

    The turns that are executed deviate from the expert's, which are recorded: see ``perturbed``.

    Args:
        path: of the file.
        episodes: to record; those that do not succeed within ``length`` steps are left out.
        config: of the arms.
        noise: deviation of the turns, as a share of the largest.
        seed: of tables, detours and noise.
        batch: arms at once, at most.
        steps: actions to record, instead of ``episodes``; the last episode is cut there.
        length: steps of an episode, at most.
        progress: called with the actions so far, after each episode.

    Raises:
        ConfigurationError: episodes and steps, or neither; or no episode of a whole batch succeeds.
    """
    if (episodes is None) == (steps is None):
        raise ConfigurationError(
            f"record_demonstrations: episodes is {episodes} and steps {steps}, expected one of them"
        )
    random = np.random.default_rng(seed)
    observation_spec, action_spec = arm_specs(config)
    about = {"env": "worldmodel/Arm-v0", "env_args": {**vars(config), "length": length}, "seed": seed, "noise": noise}
    left, acts = episodes, 0
    with EpisodeWriter(path, observation_spec, action_spec, about) as writer:
        while left or (steps is not None and acts < steps):
            wanted = left or (steps or 0) // _SHORT + 1
            worlds = ArmWorlds(min(batch, wanted + wanted // 10 + 1), config, random)
            expert = Expert(worlds, random)
            seen: list[dict[str, np.ndarray]] = []
            commands: list[np.ndarray] = []

            def act(worlds: ArmWorlds, expert: Expert = expert, commands: list[np.ndarray] = commands) -> np.ndarray:
                commands.append(expert.act())
                return perturbed(commands[-1], noise, random)

            def watch(worlds: ArmWorlds, seen: list[dict[str, np.ndarray]] = seen) -> None:
                seen.append(observation_spec.encode_batch(observed(worlds)))

            performed = perform(worlds, act, length, watch)
            watch(worlds)
            if not performed.success.any():
                raise ConfigurationError(
                    f"record_demonstrations: none of {worlds.batch} episodes succeeds within length = {length} steps "
                    f"at noise = {noise:g}: more steps or less noise may help"
                )
            for row in np.flatnonzero(performed.success)[:left]:
                taken = int(performed.first[row]) if steps is None else min(int(performed.first[row]), steps - acts)
                if not taken:
                    break
                _write(writer, seen, commands, int(row), taken, taken == performed.first[row])
                acts += taken
                left = None if left is None else left - 1
                if progress is not None:
                    progress(acts)
    return writer.steps


def _write(
    writer: EpisodeWriter,
    seen: list[dict[str, np.ndarray]],
    commands: list[np.ndarray],
    row: int,
    steps: int,
    whole: bool,
) -> None:
    for step in range(steps + 1):
        observations = {name: array[row] for name, array in seen[step].items()}
        if step == steps:
            writer.step(observations, is_last=True)
            continue
        ends = whole and step == steps - 1
        writer.step(observations, is_first=step == 0, actions=commands[step][row], rewards=float(ends), terminated=ends)

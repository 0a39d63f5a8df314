"""Makes the environments of a run."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.environments.batched import GymnasiumVectorEnvironment
from worldmodel.environments.registry import EnvironmentFailed, make, make_vector
from worldmodel.environments.vector import VectorEnvironment, random_seeds
from worldmodel.runs.configuration import ConfigurationError


def make_environments(
    name: str,
    num_envs: int,
    seed: int,
    pickle: bool = False,
    kinds: Mapping[str, str] | ObservationSpec | None = None,
    env_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> VectorEnvironment | GymnasiumVectorEnvironment:
    """Makes single environments, else a vector environment.

    Args:
        name: of the environment.
        num_envs: in parallel.
        seed: of the episodes.
        pickle: keep the environments as a pickle in checkpoints.
        kinds: of the observation's parts, for ``ObservationSpec.from_space``.
        env_args: arguments of the environment.
        image_size: most pixels per side, for ``ObservationSpec.from_space``.

    Raises:
        UnknownEnvironment, EnvironmentFailed: as for ``make``, or they cannot be pickled.
        ConfigurationError: unsupported spaces, or kinds that do not fit them.
    """
    try:
        environments = [make(name, **(env_args or {})) for _ in range(num_envs)]
    except EnvironmentFailed as failure:
        try:
            vector = make_vector(name, num_envs, **(env_args or {}))
        except EnvironmentFailed:
            raise failure from None
        with _named(name):
            episodes: VectorEnvironment | GymnasiumVectorEnvironment = GymnasiumVectorEnvironment(
                vector, seed, pickle, kinds, image_size
            )
    else:
        with _named(name):
            episodes = VectorEnvironment(
                environments, random_seeds(seed), pickle=pickle, kinds=kinds, image_size=image_size
            )
    if pickle:
        episodes.state_dict()  # fails now, not at the first checkpoint
    return episodes


def specs_of(
    name: str,
    kinds: Mapping[str, str] | ObservationSpec | None = None,
    env_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> tuple[ObservationSpec, ActionSpec]:
    """The specs of an environment, which is made once and closed. Otherwise as ``make_environments``."""
    episodes = make_environments(name, 1, 0, kinds=kinds, env_args=env_args, image_size=image_size)
    try:
        return episodes.observation_spec, episodes.action_spec
    finally:
        episodes.close()


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(f"environment {name!r}: {error}") from error

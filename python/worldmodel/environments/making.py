"""The environments of a run, made by name."""

from worldmodel.environments.registry import EnvironmentFailed, make, make_vector
from worldmodel.environments.vector import GymnasiumVectorEnvironment, VectorEnvironment, random_seeds
from worldmodel.runs.configuration import ConfigurationError


def make_environments(
    name: str, num_envs: int, seed: int, pickle: bool = False
) -> VectorEnvironment | GymnasiumVectorEnvironment:
    """A vector environment of ``num_envs`` environments, as single ones where they exist as such.

    Args:
        name: as for ``worldmodel.environments.registry.resolve``.
        num_envs: environments.
        seed: of the seeds of the episodes.
        pickle: hold them as a pickle in checkpoints, which is tried at once.

    Raises:
        UnknownEnvironment: nothing goes by that name.
        EnvironmentFailed: they cannot be made, or not be pickled.
        ConfigurationError: their spaces are not supported.
    """
    try:
        environments = [make(name) for _ in range(num_envs)]
    except EnvironmentFailed as failure:
        try:
            vector = make_vector(name, num_envs)
        except EnvironmentFailed:
            raise failure from None
        episodes: VectorEnvironment | GymnasiumVectorEnvironment = GymnasiumVectorEnvironment(vector, seed, pickle)
    else:
        try:
            episodes = VectorEnvironment(environments, random_seeds(seed), pickle=pickle)
        except ValueError as error:
            raise ConfigurationError(f"environment {name!r}: {error}") from error
    if pickle:
        episodes.state_dict()  # fails now rather than at the first checkpoint
    return episodes

"""Makes the environments of a run."""

from worldmodel.environments.registry import EnvironmentFailed, make, make_vector
from worldmodel.environments.vector import GymnasiumVectorEnvironment, VectorEnvironment, random_seeds
from worldmodel.runs.configuration import ConfigurationError


def make_environments(
    name: str, num_envs: int, seed: int, pickle: bool = False
) -> VectorEnvironment | GymnasiumVectorEnvironment:
    """Makes single environments, else a vector environment; ``pickle`` keeps them as a pickle in checkpoints.

    Raises:
        UnknownEnvironment, EnvironmentFailed: as for ``make``, or they cannot be pickled.
        ConfigurationError: unsupported spaces, of a vector environment ValueError.
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
        episodes.state_dict()  # fails now, not at the first checkpoint
    return episodes

"""MemoryLength: a bit shown at the start is asked for at the end.

    python -m worldmodel train --env worldmodel/MemoryLength-v0 --env-args length=100

bsuite's memory_len (Osband et al. 2020, arXiv 1908.03568). An episode has ``length`` + 1 actions, of which the last
alone counts: 1 for the bit that was asked for, -1 for the other. The bits are shown before the first action and once
more after it, the time that is left always, and which of the bits is asked for one step before the end.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldmodel.environments.ids import register
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error


class MemoryLength(gymnasium.Env[Any, Any]):
    """Observes the time left from 1 to 0, the number of the bit asked for, and the bits as -1 and 1, 0 if not shown.

    Args:
        length: steps from the bits to the question.
        bits: how many are shown.

    Attributes:
        answer: the right last action.

    Raises:
        ConfigurationError: ``length`` or ``bits`` is no integer of at least 1.

    Example:
        >>> chain = MemoryLength(length=2)
        >>> shown, _ = chain.reset(seed=1)
        >>> shown.tolist(), chain.answer
        ([1.0, 0.0, -1.0], 0)
        >>> [chain.step(0)[:3] for _ in range(2)][-1]
        (array([0.5, 0. , 0. ], dtype=float32), 0.0, False)
        >>> chain.step(0)[1:3]
        (1.0, True)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, length: int = 10, bits: int = 1, render_mode: str | None = None) -> None:
        for name, value in (("length", length), ("bits", bits)):
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"MemoryLength: {name} is {value!r}, expected an integer of at least 1")
        self.length, self.bits, self.render_mode = length, bits, render_mode
        low, high = np.full(bits + 2, -1, np.float32), np.ones(bits + 2, np.float32)
        low[:2], high[1] = 0, max(1, bits - 1)
        self.observation_space = gymnasium.spaces.Box(low, high)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.context = self.np_random.integers(2, size=self.bits)
        self.query = int(self.np_random.integers(self.bits))
        self.answer = int(self.context[self.query])
        self.steps = 0
        return self._observation(0), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation = self._observation(self.steps)
        ends = self.steps == self.length
        reward = (1.0 if int(action) == self.answer else -1.0) if ends else 0.0
        self.steps += 1
        return observation, reward, ends, False, {}

    def _observation(self, step: int) -> NDArray[np.float32]:
        observation = np.zeros(self.bits + 2, np.float32)
        observation[0] = 1 - step / self.length
        if step == self.length - 1:
            observation[1] = self.query
        if step == 0:
            observation[2:] = 2 * self.context - 1
        return observation


register(gymnasium, "worldmodel.environments.memory_length:MemoryLength")

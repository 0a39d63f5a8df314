"""A scripted expert, closed-loop: it turns the joints towards the next of some places of the hand.

Between the arm and the table hangs a disc. The expert passes it on either side with equal probability, whatever the
task and the block's place are: who imitates it by the mean of both runs into the disc.
"""

import numpy as np

from worldmodel.environments.arm.body import MOST_TURN, angles_for
from worldmodel.environments.arm.worlds import CELL, CELLS, HALF, PICK, PUSH, STACK, WIPE, ArmWorlds

_SPEED = 0.05  # of the hand per step
_REACHED = 0.012
_ASIDE = 0.24  # of the obstacle's middle, where the hand passes it
_ABOVE, _LOW = 0.27, 0.05  # heights of the hand
_PLACES = 9


class Expert:
    """Acts in ``worlds`` from their start to their success.

    Args:
        worlds: as they are after their making.
        random: draws the side of each detour.

    Attributes:
        side: of the obstacle that each arm passes, -1 left or 1 right: (batch,).

    Example:
        >>> from worldmodel.environments.arm.worlds import ArmConfig
        >>> random = np.random.default_rng(0)
        >>> worlds = ArmWorlds(8, ArmConfig(), random)
        >>> expert = Expert(worlds, random)
        >>> any(worlds.step(expert.act()).all() for _ in range(100))
        True
    """

    def __init__(self, worlds: ArmWorlds, random: np.random.Generator) -> None:
        self.worlds = worlds
        self.side = np.where(random.random(worlds.batch) < 0.5, -1, 1)
        self._places, self._closed = self._plan(np.where(random.random(worlds.batch) < 0.5, -1, 1))
        self._next = np.zeros(worlds.batch, np.int64)

    def act(self) -> np.ndarray:
        """Actions of this step, for ``ArmWorlds.step``: (batch, 4)."""
        worlds, rows = self.worlds, np.arange(self.worlds.batch)
        hands = worlds.hands
        there = np.linalg.norm(hands - self._places[rows, self._next], axis=1) < _REACHED
        there &= worlds.closed == self._closed[rows, self._next]
        self._next = np.minimum(self._next + there, _PLACES - 1)
        place, before = self._places[rows, self._next], self._places[rows, self._next - (self._next > 0)]
        closed, way = self._closed[rows, self._next], place - hands
        sinks = (before[:, 1] == _ABOVE) & (place[:, 1] < _ABOVE)
        way[sinks & (np.abs(way[:, 0]) > _REACHED), 1] = 0  # a block may be beside
        way = way * (_SPEED / np.linalg.norm(way, axis=1).clip(_SPEED))[:, None]
        turns = (angles_for(hands + way) - worlds.angles) / MOST_TURN
        turns = turns / np.abs(turns).max(1).clip(1)[:, None]
        return np.concatenate([turns, np.where(closed, 1.0, -1.0)[:, None]], 1)

    def _plan(self, sweep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the hand (batch, places, 2), and whether the gripper is closed there; ``sweep``: to wipe."""
        worlds = self.worlds
        red, blue = worlds.blocks[:, 0, 0], worlds.blocks[:, 1, 0]
        aside = worlds.obstacle[:, 0] + self.side * _ASIDE
        passing = [(aside, worlds.obstacle[:, 1], False), (aside, _ABOVE, False)]
        if not worlds.config.obstacle:
            passing = [(worlds.hands[:, 0], _ABOVE, False)] * 2
        lift = [(red, _ABOVE, False), (red, _LOW, False), (red, _LOW, True), (red, _ABOVE, True)]
        top = _LOW + 2 * HALF + 0.002
        stack = [*lift, (blue, _ABOVE, True), (blue, top, True), (blue, top, False)]
        behind = np.where(worlds.mark > red, -1, 1)
        start = red + behind * (HALF + 0.05)
        push = [(start, _ABOVE, True), (start, _LOW, True), (worlds.mark + behind * (HALF + 0.026), _LOW, True)]
        ends = [worlds.mark + end * sweep * CELL * CELLS / 2 for end in (-1, 1)]
        wipe = [(ends[0], _ABOVE, True), (ends[0], _LOW, True), (ends[1], _LOW, True)]
        places = np.zeros((worlds.batch, _PLACES, 2))
        closed = np.zeros((worlds.batch, _PLACES), bool)
        for task, after in ((PICK, lift), (PUSH, push), (STACK, stack), (WIPE, wipe)):
            rows = worlds.task == task
            way = [*passing, *after]
            for index, (x, y, shut) in enumerate(way + [way[-1]] * (_PLACES - len(way))):
                both = np.broadcast_arrays(x, y, np.zeros(worlds.batch))[:2]
                places[rows, index] = np.stack(both, -1)[rows]
                closed[rows, index] = shut
        return places, closed


def perturbed(actions: np.ndarray, noise: float, random: np.random.Generator) -> np.ndarray:
    """Actions (batch, 4) as they are executed while an expert is recorded: the gripper's are as they were.

    Turns deviate by normal noise, ``noise`` times the largest turn, so that a recording tells how the expert comes back
    from where it does not go by itself (Laskey et al. 2017, arXiv 1703.09327).
    """
    turns = actions[:, :3]
    turns = turns + noise * np.abs(turns).max(1, keepdims=True) * random.normal(size=turns.shape)
    return np.concatenate([turns.clip(-1, 1), actions[:, 3:]], 1)

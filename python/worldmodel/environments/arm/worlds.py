"""Arms, blocks and tasks, many at once.

    pick    lift the red block
    push    move the red block along the table to the mark
    stack   put the red block on the blue one
    wipe    pass the closed gripper over all dirt

Contact is quasi-static, in sub-steps: fingers push a block sideways, and a move that would pass a block from above,
the table, the obstacle or another block does not happen. A gripper that closes around a block holds it. What is not
held falls, and slides off what is not under its middle. Contact takes fingers and blocks as upright, and links touch
nothing.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np

from worldmodel.environments.arm.body import (
    CLOSED,
    FINGER,
    HOLDING,
    MOST_TURN,
    OPEN,
    UPRIGHT,
    angles_for,
    fingers_of,
    hand_of,
)
from worldmodel.runs.fields import Checked

Task = Literal["pick", "push", "stack", "wipe"]
TASKS: tuple[str, ...] = get_args(Task)
PICK, PUSH, STACK, WIPE = range(4)
HALF = 0.05  # of a block's side
LIFTED = 0.22  # of a picked block's middle
NEAR_MARK = 0.03
RADIUS = 0.09  # of the obstacle
HAND_RADIUS = 0.03  # for the obstacle
CELLS, CELL = 8, 0.026  # of dirt
NOTHING = -1
_SUBSTEPS = 4
_FALL = 0.03  # per sub-step
_SLIDE = 0.01
_EPS = 1e-9
_SLOTS = np.array([0.18, 0.5, 0.82])
# Slots of the red block, the blue one and the mark; the blue block is never between the others.
_ORDERS = np.array([[0, 2, 1], [1, 2, 0], [1, 0, 2], [2, 0, 1]])


@dataclasses.dataclass(frozen=True)
class ArmConfig(Checked):
    """What an episode is.

    Attributes:
        task: one of ``TASKS``, or any, drawn for each episode.
        obstacle: whether a disc hangs between the arm and the table.
        joints: whether the observation has the joints' angles and the gripper.
        ends: whether an episode terminates at its first success.
    """

    task: Literal["any", "pick", "push", "stack", "wipe"] = "any"
    obstacle: bool = True
    joints: bool = False
    ends: bool = True


class ArmWorlds:
    """``batch`` tables with an arm.

    Attributes:
        task: int64 (batch,), index into ``TASKS``.
        angles: of the joints, radians, at most half a turn, (batch, 3).
        closed: whether the gripper is, bool (batch,).
        held: block between the fingers, or ``NOTHING``: int64 (batch,).
        blocks: middles of the red and the blue one, (batch, 2, 2).
        mark: x of the mark, or of the middle of the dirt, (batch,).
        dirt: which cells are dirty, bool (batch, CELLS).
        obstacle: middle of the disc, (batch, 2); far away without one.

    Example:
        >>> worlds = ArmWorlds(3, ArmConfig(task="pick"), np.random.default_rng(0))
        >>> for _ in range(20):
        ...     success = worlds.step(np.zeros((3, 4)))
        >>> worlds.hands.shape, success.tolist()
        ((3, 2), [False, False, False])
    """

    def __init__(self, batch: int, config: ArmConfig, random: np.random.Generator) -> None:
        self.batch, self.config = batch, config
        tasks = random.integers(len(TASKS), size=batch)
        self.task = tasks if config.task == "any" else np.full(batch, TASKS.index(config.task))
        places = _SLOTS[_ORDERS[random.integers(len(_ORDERS), size=batch)]] + random.uniform(-0.04, 0.04, (batch, 3))
        self.blocks = np.stack([places[:, :2], np.full((batch, 2), HALF)], -1)
        self.mark = places[:, 2]
        self.dirt = np.repeat((self.task == WIPE)[:, None], CELLS, 1)
        disc = random.uniform([0.44, 0.48], [0.56, 0.54], (batch, 2))
        self.obstacle = disc if config.obstacle else np.full((batch, 2), -9.0)
        self.angles = angles_for(random.uniform([0.46, 0.73], [0.54, 0.77], (batch, 2)))
        self.closed = np.zeros(batch, bool)
        self.held = np.full(batch, NOTHING)

    @property
    def hands(self) -> np.ndarray:
        """Between the fingertips, (batch, 2)."""
        return hand_of(self.angles)

    @property
    def opening(self) -> np.ndarray:
        """Distance of each finger from the middle of the hand, (batch,)."""
        return np.where(self.held != NOTHING, HOLDING, np.where(self.closed, CLOSED, OPEN))

    @property
    def cells(self) -> np.ndarray:
        """x of the cells of dirt, (batch, CELLS)."""
        return self.mark[:, None] + CELL * (np.arange(CELLS) - (CELLS - 1) / 2)

    @property
    def success(self) -> np.ndarray:
        """Whether the task is done now, bool (batch,)."""
        red, blue = self.blocks[:, 0], self.blocks[:, 1]
        free = self.held == NOTHING
        on_blue = (np.abs(red[:, 1] - blue[:, 1] - 2 * HALF) < 0.005) & (np.abs(red[:, 0] - blue[:, 0]) < HALF)
        at_mark = (np.abs(red[:, 0] - self.mark) < NEAR_MARK) & (red[:, 1] < HALF + 0.005)
        done = [(self.held == 0) & (red[:, 1] > LIFTED), at_mark & free, on_blue & free, ~self.dirt.any(1)]
        return np.choose(self.task, done)

    def step(self, actions: np.ndarray) -> np.ndarray:
        """One step.

        Args:
            actions: (batch, 4), -1 to 1: turns of the joints in units of ``MOST_TURN``; the gripper, closed above 0.

        Returns:
            ``success``.

        Raises:
            ValueError: actions of another shape, NaN, or beyond -1 to 1.
        """
        actions = np.asarray(actions, np.float64)
        if actions.shape != (self.batch, 4) or not (np.abs(actions) <= 1 + 1e-6).all():
            raise ValueError(
                f"ArmWorlds: actions have shape {actions.shape} and reach {np.abs(actions).max(initial=0)}, expected "
                f"({self.batch}, 4) from -1 to 1"
            )
        self._grip(actions[:, 3] > 0)
        for _ in range(_SUBSTEPS):
            self._turn(actions[:, :3] * (MOST_TURN / _SUBSTEPS))
            self._fall()
            self._wipe()
        return self.success

    def _grip(self, closed: np.ndarray) -> None:
        """Opens, or closes around a block or nothing; fingers that meet a block stay as they are."""
        hands = self.hands
        self.held[~closed] = NOTHING
        offset = np.abs(self.blocks - hands[:, None])  # (batch, blocks, 2)
        between = (offset[..., 0] < OPEN - FINGER[0] - HALF) & (offset[..., 1] < FINGER[1])
        upright = np.abs(self.angles.sum(1)) < UPRIGHT
        holds = closed & ~self.closed & upright & between.any(1)
        index = between.argmax(1)
        rows = np.flatnonzero(holds)
        self.blocks[rows, index[rows], 0] = hands[rows, 0]
        self.held[rows] = index[rows]
        changes = closed != self.closed
        before, self.closed = self.closed, closed.copy()
        met = self._fingers_overlap(hands, self.blocks) & changes & ~holds
        self.closed[met] = before[met]

    def _turn(self, turns: np.ndarray) -> None:
        angles, hands = self.angles + turns, self.hands
        ahead = hand_of(angles)
        blocks = self.blocks.copy()
        rows = np.flatnonzero(self.held != NOTHING)
        blocks[rows, self.held[rows]] += (ahead - hands)[rows]
        fits = np.linalg.norm(ahead - self.obstacle, axis=1) > RADIUS + HAND_RADIUS
        fits &= (np.abs(angles) <= np.pi).all(1)
        fits &= (ahead[:, 1] > FINGER[1]) & (ahead[:, 0] > 0) & (ahead[:, 0] < 1)
        for block in range(2):
            beside = np.abs(self.blocks[:, block, 1] - hands[:, 1]) < FINGER[1] + HALF - _EPS
            for finger in fingers_of(ahead, self.opening).swapaxes(0, 1):
                gap = blocks[:, block] - finger
                over = FINGER + HALF - np.abs(gap)
                pushed = (over > _EPS).all(1) & (self.held != block) & beside
                blocks[:, block, 0] += np.where(pushed, np.where(gap[:, 0] < 0, -1, 1) * over[:, 0], 0)
        apart = (np.abs(blocks[:, 0] - blocks[:, 1]) > 2 * HALF - _EPS).any(1)
        inside = (blocks[..., 0] > HALF) & (blocks[..., 0] < 1 - HALF) & (blocks[..., 1] > HALF - _EPS)
        nearest = np.abs(blocks - self.obstacle[:, None]) - HALF
        clear = np.linalg.norm(nearest.clip(0), axis=-1) > RADIUS
        fits &= apart & (inside & clear).all(1) & ~self._fingers_overlap(ahead, blocks)
        self.angles = np.where(fits[:, None], angles, self.angles)
        self.blocks = np.where(fits[:, None, None], blocks, self.blocks)

    def _fingers_overlap(self, hands: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Whether a finger is in a block that is not held: bool (batch,)."""
        gaps = np.abs(blocks[:, :, None] - fingers_of(hands, self.opening)[:, None])  # (batch, blocks, fingers, 2)
        within = (gaps < FINGER + HALF - 1e-6).all(-1).any(-1)
        return (within & (self.held[:, None] != np.arange(2))).any(1)

    def _fall(self) -> None:
        for block in range(2):
            this, other = self.blocks[:, block], self.blocks[:, 1 - block]
            aside = this[:, 0] - other[:, 0]
            above = (np.abs(aside) < 2 * HALF - _EPS) & (this[:, 1] > other[:, 1])
            rest = np.where(above, other[:, 1] + 2 * HALF, HALF)
            free = self.held != block
            lower = np.maximum(this[:, 1] - _FALL, rest)
            slides = free & above & (this[:, 1] <= rest + _EPS) & (np.abs(aside) > HALF)
            self.blocks[:, block, 1] = np.where(free, np.minimum(lower, np.maximum(this[:, 1], rest)), this[:, 1])
            self.blocks[:, block, 0] += np.where(slides, np.where(aside < 0, -_SLIDE, _SLIDE), 0)

    def _wipe(self) -> None:
        hands = self.hands
        low = self.closed & (hands[:, 1] < FINGER[1] + 0.03)
        self.dirt &= ~(low[:, None] & (np.abs(self.cells - hands[:, :1]) < 0.03))

"""Joints, hand and fingers of a planar arm that hangs from above.

The table is 1 wide, x to the right and y upwards from its top. Joint angles are relative, in radians; with all at 0 the
arm hangs straight down.
"""

import numpy as np

BASE = np.array([0.5, 1.1])
LINKS = np.array([0.55, 0.5, 0.15])
_HANGING = np.array([0.0, LINKS[2]])  # from hand to wrist
MOST_TURN = 0.12  # radians per step and joint
FINGER = np.array([0.012, 0.04])  # half width and half height
OPEN, CLOSED, HOLDING = 0.09, 0.014, 0.062  # distance of a finger from the middle of the hand
UPRIGHT = 0.5  # radians; the hand grasps only if it points down as well as that


def joints_of(angles: np.ndarray) -> np.ndarray:
    """Base, elbow, wrist and hand: (..., 3) -> (..., 4, 2)."""
    sums = angles.cumsum(-1)
    directions = np.stack([np.sin(sums), -np.cos(sums)], -1) * LINKS[:, None]
    return BASE + np.concatenate([np.zeros_like(directions[..., :1, :]), directions.cumsum(-2)], -2)


def hand_of(angles: np.ndarray) -> np.ndarray:
    """Place between the fingertips: (..., 3) -> (..., 2)."""
    return joints_of(angles)[..., -1, :]


def angles_for(hands: np.ndarray) -> np.ndarray:
    """Angles that bring the hand, pointing down, to ``hands``, or as near as the arm reaches: (..., 2) -> (..., 3)."""
    upper, lower, _ = LINKS
    reach = hands + _HANGING - BASE
    distance = np.linalg.norm(reach, axis=-1).clip(upper - lower + 1e-3, upper + lower - 1e-3)
    elbow = np.arccos((distance**2 - upper**2 - lower**2) / (2 * upper * lower))
    shoulder = np.arctan2(reach[..., 0], -reach[..., 1])
    shoulder = shoulder - np.arctan2(lower * np.sin(elbow), upper + lower * np.cos(elbow))
    return np.stack([shoulder, elbow, -shoulder - elbow], -1)


def fingers_of(hands: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """Middles of both fingers: hands (..., 2), opening (...) -> (..., 2, 2)."""
    offset = np.stack([-opening, opening], -1)
    return hands[..., None, :] + np.stack([offset, np.zeros_like(offset)], -1)

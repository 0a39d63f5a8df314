"""Draws the scripted expert's episodes, a row per task: python scripts/arm_picture.py docs/arm.png."""

import sys
from pathlib import Path

import imageio
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from worldmodel.environments.arm.expert import Expert
from worldmodel.environments.arm.pictures import pictures
from worldmodel.environments.arm.worlds import TASKS, ArmConfig, ArmWorlds

SIDE, GAP, FRAMES, STEPS = 160, 4, 6, 100


def episode(task: str, seed: int) -> np.ndarray:
    """Frames at equal times from the start to the success, and the first one as an agent observes it."""
    random = np.random.default_rng(seed)
    worlds = ArmWorlds(1, ArmConfig(task=task), random)  # type: ignore[arg-type]
    expert = Expert(worlds, random)
    frames, seen = [pictures(worlds, SIDE)[0]], pictures(worlds, 32)[0]
    while not worlds.step(expert.act())[0]:
        frames.append(pictures(worlds, SIDE)[0])
        assert len(frames) <= STEPS, task
    frames.append(pictures(worlds, SIDE)[0])
    times = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    chosen = [frames[time] for time in times] + [seen.repeat(SIDE // 32, 0).repeat(SIDE // 32, 1)]
    return np.concatenate([np.pad(frame, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for frame in chosen], 1)


if __name__ == "__main__":
    imageio.imwrite(sys.argv[1], np.concatenate([episode(task, seed) for seed, task in enumerate(TASKS)]))

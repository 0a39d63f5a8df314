"""A picture of one imagined world before and after an edit, and of its fork: the view of one place, and the map.

    python scripts/world_edit_picture.py RUN docs/world_edit.png

RUN is of `train-world` on `worldmodel/Rooms-v0`; matplotlib draws.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from worldmodel.acting.world import World
from worldmodel.demo.world_picture import INK, show
from worldmodel.demo.worlds import look, walk
from worldmodel.environments.grids import palette

mpl.use("Agg")
import matplotlib.pyplot as plt

SIZE, SEED, STEPS = 32, 4, 250
NORTH, EAST, SOUTH, WEST = range(4)
WHITE, GREEN = 7, 2
MARK = "#ff2d95"  # around what was edited


def away_and_back(world: World, actions: list[int]) -> np.ndarray:
    """The view on return; a wall in the way is left where it is."""
    led = []
    for action in actions:
        before = world.bodies[0].position.clone()
        world.step(action)
        led += [] if torch.equal(before, world.bodies[0].position) else [action]
    for action in reversed(led):
        world.step((action + 2) % 4)
    return world.observe()


def edit(world: World, offsets: list[tuple[int, int]], value: int) -> list[tuple[int, int]]:
    """Puts ``value`` at offsets from the agent; returns the places."""
    half = world.size // 2
    at = (world.bodies[0].position + half).tolist()
    places = [((at[0] + row) % world.size - half, (at[1] + column) % world.size - half) for row, column in offsets]
    for place in places:
        world.edit(place, value)
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    world = World.create(options.run, SEED, size=SIZE)
    walk(world, STEPS, SEED)
    before = world.observe(), look(world)
    ring = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]
    corners = [(row, column) for row in (-2, 2) for column in (-2, 2)]
    edited = world.fork()
    edit(edited, ring, WHITE)
    fork = edited.fork(seed=1)
    edit(fork, corners, GREEN)
    edited_view = away_and_back(edited, [EAST] * 14 + [NORTH] * 8)
    fork_view = away_and_back(fork, [WEST] * 14 + [SOUTH] * 8)
    panes = {
        "before": (*before, []),
        "edited, left, and on return": (edited_view, look(edited), ring),
        "its fork, edited once more": (fork_view, look(fork), ring + corners),
    }
    known = before[1] >= 0
    for (_, places, marked), own in zip(list(panes.values())[1:], (edited, fork), strict=True):
        at = own.bodies[0].position.numpy() + SIZE // 2
        changed = {tuple(place) for place in np.argwhere(known & (places != before[1])).tolist()}
        allowed = {tuple(((at + offset) % SIZE).tolist()) for offset in marked}
        assert changed <= allowed, "a place that was not edited is another"
    draw(panes, world.bodies[0].position.numpy() + SIZE // 2, options.picture)
    print(f"{options.picture}: of {int(known.sum()):,} places, none changed that was not edited")


def draw(panes: dict[str, tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]], at: np.ndarray, picture: Path) -> None:
    """Views above maps around the agent ``at``, where its view is framed; what was edited is framed in both."""
    middle = np.array([SIZE // 2, SIZE // 2])
    inked = ("text.color", "axes.titlecolor", "axes.labelcolor", "axes.edgecolor")
    with plt.rc_context({"font.size": 11, **dict.fromkeys(inked, INK)}):
        figure, axes = plt.subplots(2, len(panes), figsize=(9.6, 6.6), layout="constrained")
        for column, (title, (view, places, marked)) in enumerate(panes.items()):
            half = view.shape[0] // 2
            show(axes[0, column], title, view, palette(8))
            show(axes[1, column], "", np.roll(places, middle - at, (0, 1)), palette(8))
            axes[0, column].plot(half, half, "o", ms=7, mfc="white", mec="black")
            for row, place in ((0, np.array([half, half])), (1, middle)):
                for y, x in (place + np.array(offset) for offset in marked):
                    axes[row, column].add_patch(
                        plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec=MARK, lw=(1.4, 0.5)[row])
                    )
            corner = middle - half - 0.5
            axes[1, column].add_patch(plt.Rectangle(corner, *view.shape, fill=False, ec=INK, lw=1.6))
        axes[0, 0].set_ylabel("the agent's view")
        axes[1, 0].set_ylabel("what the map holds")
        figure.savefig(picture, dpi=110, transparent=True)


if __name__ == "__main__":
    main()

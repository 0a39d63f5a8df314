"""MiniGrid's tasks as pictures."""

import gymnasium
import numpy as np
import pytest

from worldmodel.environments.making import specs_of
from worldmodel.environments.minigrid_pictures import make
from worldmodel.learning.presets import choose_preset
from worldmodel.runs.fields import ConfigurationError

TASK = "worldmodel/MiniGridPictures-v0"


def test_a_picture_shows_what_happens_and_follows_from_the_seed():
    env, again = make(), make()
    first, same = env.reset(seed=3)[0], again.reset(seed=3)[0]
    assert first.dtype == np.uint8 and np.array_equal(first, same)
    turned = env.step(0)[0]
    assert not np.array_equal(turned, first), "the agent has turned"
    assert not np.array_equal(make(view="partial").reset(seed=3)[0], first)


def test_pictures_are_read_as_such_and_resized():
    observed, acted = specs_of(TASK, env_args={"task": "MiniGrid-FourRooms-v0"}, image_size=64)
    (modality,) = observed.modalities.values()
    assert (modality.kind, modality.shape) == ("image", (64, 64, 3)) and acted.sizes == (7,)
    assert choose_preset(TASK, observed, acted)[0] == "pixels"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "MiniGrid-FourRoom-v0"}, "task is 'MiniGrid-FourRoom-v0', .*such as MiniGrid-FourRooms-v0"),
        ({"view": "side"}, "view is 'side', expected full or partial"),
        ({"tile": 0}, "tile is 0, expected an integer of at least 1"),
    ],
)
def test_what_is_no_task_view_or_tile_is_refused(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        gymnasium.make(TASK, **arguments)

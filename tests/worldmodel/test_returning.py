"""Scores by gap: cells are counted where they belong, and the baselines do what they say."""

import json
import math

import pytest
import torch

from worldmodel.environments.drift import DriftConfig, DriftWorlds
from worldmodel.environments.returning import BUCKETS, GAPS, Score, baselines, score, table
from worldmodel.environments.rooms import RoomsConfig, RoomWorlds


def rooms(batch=4, **options) -> RoomWorlds:
    return RoomWorlds(batch, RoomsConfig(**options), torch.Generator().manual_seed(0))


def test_each_cell_is_counted_once_in_its_bucket():
    gaps = [-1, 0, 1, 8, 9, 32, 33, 128, 129, 512, 513, 2048, 2049, 10**9, 5, 5]
    steps = {
        "next_tokens": torch.zeros(1, 1, 16, dtype=torch.int64),
        "gap": torch.tensor(gaps)[None, None],
        "inside": torch.tensor([True] * 15 + [False])[None, None],
        "edited": torch.zeros(1, 1, 16, dtype=torch.bool),
        "fresh": torch.zeros(1, 1, 16, dtype=torch.bool),
    }
    steps["fresh"][..., 14] = True
    steps["edited"][..., 3] = True
    predicted = torch.zeros(1, 1, 16, dtype=torch.int64)
    predicted[..., 5] = 1  # the gap of 32
    found = Score()
    found.add(predicted, steps)
    told = found.to_json()
    assert {name: value["cells"] for name, value in told.items()} == {
        **{"1-8": 1, "9-32": 2, "33-128": 2, "129-512": 2, "513-2048": 2, "2049+": 2},
        **{"edited 1-8": 1, "in view": 1, "new": 1, "outside": 1, "returning": 12, "returning, edited": 1},
    }
    assert told["9-32"]["accuracy"] == 0.5 and told["returning"]["accuracy"] == found.accuracy == 11 / 12
    assert found.by_gap() == dict(zip(BUCKETS, [1, 0.5, 1, 1, 1, 1], strict=True))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 15\), expected \(1, 1, 16\)"):
        found.add(predicted[..., :15], steps)


def test_scores_agree_with_a_count_by_hand():
    steps = rooms(size=7, edits=0.3).rollout(200)
    found = Score()
    found.add(steps["tokens"], steps)
    right = (steps["tokens"] == steps["next_tokens"]) & ~steps["fresh"]
    for name, (low, high) in zip(BUCKETS, GAPS, strict=True):
        here = (steps["gap"] >= low) & (steps["gap"] <= (high or 10**9)) & steps["inside"] & ~steps["fresh"]
        if here.any():
            assert math.isclose(found.by_gap()[name], right[here].double().mean())
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"edits": 0.3, "bumps": True}, {"own_heading": True, "edits": 0.1}, {"agents": 2, "edits": 0.2}],
    ids=["plain", "edits and bumps", "own heading", "two agents"],
)
def test_the_cell_map_and_the_oracle_know_all_that_was_seen(options):
    worlds = rooms(size=7, **options)
    scores = score(worlds, baselines(worlds), 300, chunk=64)
    assert scores["cell map"].accuracy == scores["oracle"].accuracy == 1
    assert scores["cell map"].cells.equal(scores["chance"].cells) and scores["chance"].cells[:, :3].sum() > 500
    assert scores["chance"].accuracy < 0.3 and scores["persistence"].accuracy < 0.3
    if "edits" in options:
        assert scores["oracle"].to_json()["returning, edited"]["cells"] > 100
    new = scores["oracle"].to_json()["new"]["accuracy"]
    assert new < 0.4, "nothing tells what was never seen"


def test_a_map_of_cells_does_not_know_where_blocks_went():
    worlds = DriftWorlds(8, DriftConfig(), torch.Generator().manual_seed(0))
    scores = score(worlds, baselines(worlds), 300)
    assert scores["oracle"].accuracy == 1 and 0.1 < scores["cell map"].accuracy < 0.5
    resting = DriftWorlds(8, DriftConfig(velocities=((0, 0), (0, 0))), torch.Generator().manual_seed(0))
    assert score(resting, baselines(resting), 300)["cell map"].accuracy == 1


def test_the_table_has_a_row_per_score():
    worlds = rooms()
    lines = table(score(worlds, baselines(worlds), 64)).splitlines()
    assert [line[:11].strip() for line in lines] == ["", "chance", "persistence", "cell map", "oracle"]
    assert lines[3].split()[2:4] == ["100.000", "100.000"] and len({len(line) for line in lines}) == 1

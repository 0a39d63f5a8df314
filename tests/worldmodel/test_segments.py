"""A checkpoint writes what is new of a replay, and what it lists is there whatever happens."""

import contextlib
import copy
import itertools
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from test_replay import STATE, Recorder, assert_same, single

from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs import segments, sequences, storage
from worldmodel.runs.run import Run, RunError

FRAMES = spaces.Box(0, 255, (32, 32, 3), np.uint8)
IMAGES = ObservationSpec.from_space(FRAMES), ActionSpec.from_space(spaces.Discrete(6))
FRAME = 32 * 32 * 3


def new_run(folder: Path) -> Run:
    return Run.create(folder / "run", {"train": {}})


class Filled:
    """A replay of images whose content cannot be compressed."""

    def __init__(self, num_envs: int, config: ReplayConfig, seed: int = 0) -> None:
        self.replay, self.num_envs = Replay(*IMAGES, num_envs, config), num_envs
        self.random = np.random.default_rng(seed)
        self.replay.begin(np.arange(num_envs), self.frames())

    def frames(self) -> dict[str, np.ndarray]:
        return {"observation": self.random.integers(0, 256, (self.num_envs, 32, 32, 3), np.uint8)}

    def steps(self, count: int) -> None:
        rows, zeros = np.arange(self.num_envs), np.zeros(self.num_envs, bool)
        for _ in range(count):
            self.replay.add(rows, rows % 6, np.ones(self.num_envs, np.float32), zeros, zeros, self.frames())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


def state_of(replay: Replay) -> dict[str, Any]:
    """As it is loaded."""
    state = replay.state_dict()
    found = state["sequences"]
    return copy.deepcopy({**state, "sequences": {each: dict(found.arrays(each)) for each in found.ids}})


def written(run: Run, steps: int, replay: Replay) -> int:
    """Bytes that a checkpoint adds."""
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    run.save(steps, {"replay": replay.state_dict()})
    new = [path for path in run.folder.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)]
    return sum(path.stat().st_size for path in new)


def test_a_checkpoint_writes_the_steps_since_the_one_before(tmp_path: Path) -> None:
    run, filled = new_run(tmp_path), Filled(4, ReplayConfig(window=64, burn_in=4))
    filled.steps(100)
    first = written(run, 1, filled.replay)
    # 101 observations of 4 environments, and 5 that the second window of each repeats.
    assert 4 * 106 * FRAME < first < 4 * 106 * FRAME + 40_000
    filled.steps(10)
    assert 40 * FRAME < written(run, 2, filled.replay) < 40 * FRAME + 40_000
    again = Replay(*IMAGES, 4, filled.replay.config)
    again.load_state_dict(run.load("replay"))
    assert same(state_of(again), state_of(filled.replay)) and again.nbytes == filled.replay.nbytes
    # So does a checkpoint after a resume.
    filled.replay = again
    filled.steps(10)
    assert 40 * FRAME < written(run, 3, again) < 40 * FRAME + 40_000
    assert same(dict(run.load("replay")), state_of(again))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_unfinished_steps_take_the_memory_that_they_need_the_same_after_a_resume(tmp_path: Path, num_envs: int) -> None:
    run, filled = new_run(tmp_path), Filled(num_envs, ReplayConfig(window=4096, burn_in=4))
    for count in (1, 6, 20, 200):
        filled.steps(count)
        total = filled.replay.added // num_envs + 1
        # Room grows by half, and no observation takes more than a frame and 100 bytes.
        assert total * FRAME * num_envs < filled.replay.nbytes < max(8, 1.5 * total) * (FRAME + 100) * num_envs + 4000
        run.save(filled.replay.added, {"replay": filled.replay.state_dict()})
        again = Replay(*IMAGES, num_envs, filled.replay.config)
        again.load_state_dict(run.load("replay"))
        assert again.nbytes == filled.replay.nbytes


def test_the_folder_is_bounded_while_a_replay_drops_its_oldest_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "PACK_BYTES", 20 * FRAME)
    monkeypatch.setattr(segments, "PACK_BYTES", 20 * FRAME)
    run, filled = new_run(tmp_path), Filled(2, ReplayConfig(window=16, burn_in=2, max_steps=200))
    most, total = 0, 0
    for steps in range(1, 31):
        filled.steps(17)
        total += written(run, steps, filled.replay)
        # Twice the rows in use of each of two checkpoints; at most 250 rows and 4 kB of the rest.
        most = max(most, size(run.folder))
        live = sum(len(each["elapsed"]) for each in state_of(filled.replay)["sequences"].values())
        assert live <= 280 and most <= 4 * (280 * FRAME + 40_000)
    assert most < 2.2 * 280 * FRAME  # most go with their whole segment
    collected = 30 * 17 * 2 * 1.2 * FRAME  # burn-in is stored twice
    assert total < 1.5 * collected
    again = Replay(*IMAGES, 2, filled.replay.config)
    again.load_state_dict(run.load("replay"))
    assert same(state_of(again), state_of(filled.replay))


def test_small_segments_are_joined_when_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MOST_SMALL", 8)
    run, filled = new_run(tmp_path), Filled(1, ReplayConfig(window=16, burn_in=2))
    counts = []
    for steps in range(1, 31):
        filled.steps(1)
        run.save(steps, {"replay": filled.replay.state_dict()})
        counts.append(len(list((run.folder / "replay").iterdir())))
    assert 9 <= max(counts) <= 2 * 10
    assert same(dict(run.load("replay")), state_of(filled.replay))


def test_saving_and_loading_need_the_memory_of_a_few_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = 2**18
    monkeypatch.setattr(sequences, "PACK_BYTES", pack)
    run, filled = new_run(tmp_path), Filled(4, ReplayConfig(window=64, burn_in=4))
    filled.steps(400)
    total = filled.replay.nbytes
    assert total > 16 * pack
    tracemalloc.start()
    run.save(1, {"replay": filled.replay.state_dict()})
    assert tracemalloc.get_traced_memory()[1] < 6 * pack
    tracemalloc.reset_peak()
    run.load("replay")
    assert tracemalloc.get_traced_memory()[1] < total + 6 * pack
    tracemalloc.stop()


@pytest.mark.parametrize("compressible", [True, False])
def test_frames_are_compressed_where_that_helps(tmp_path: Path, compressible: bool) -> None:
    run, filled = new_run(tmp_path), Filled(2, ReplayConfig(window=64, burn_in=4))
    if compressible:
        filled.frames = lambda: {"observation": np.full((2, 32, 32, 3), 7, np.uint8)}  # type: ignore[method-assign]
    filled.steps(100)
    ratio = written(run, 1, filled.replay) / filled.replay.nbytes
    assert ratio < 0.05 if compressible else 0.7 < ratio < 1.1
    assert same(dict(run.load("replay")), state_of(filled.replay))


class Killed(BaseException):
    """Simulates a kill: nothing is tidied up."""


def operations(patch: pytest.MonkeyPatch, dies: Callable[[int], bool]) -> Callable[[], int]:
    """Kills before the operation on files for which ``dies``; returns how many there were."""
    count = itertools.count()
    done = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            done[0] = next(count)
            if dies(done[0]):
                raise Killed
            return real(*arguments, **options)

        return call

    on_paths = ("mkdir", "rename", "replace")
    for where, names in ((Path, on_paths), (os, ("fsync", "unlink", "rmdir")), (storage, ("_write",))):
        for name in names:
            patch.setattr(where, name, counted(getattr(where, name)))
    return lambda: done[0] + 1


@pytest.mark.parametrize("replace", [False, True])
def test_a_kill_between_any_two_operations_on_files_leaves_a_checkpoint_that_loads(
    tmp_path: Path, replace: bool
) -> None:
    def saved(folder: Path, dies: Callable[[int], bool]) -> tuple[Run, list[dict[str, Any]], Replay, int]:
        run, filled = new_run(folder), Filled(2, ReplayConfig(window=8, burn_in=2, max_steps=20))
        states = []
        for steps in (1,) if replace else (1, 2):
            filled.steps(9)
            run.save(steps, {"replay": filled.replay.state_dict(), "trainer": {"steps": steps}})
            states.append(state_of(filled.replay))
        filled.steps(9)
        states.append(state_of(filled.replay))
        with pytest.MonkeyPatch.context() as patch:
            count = operations(patch, dies)
            parts = {"replay": filled.replay.state_dict(), "trainer": {"steps": 3}}
            with contextlib.suppress(Killed):
                run.save(1 if replace else 3, parts, replace=replace)
            return run, states, filled.replay, count()

    everything = saved(tmp_path / "whole", lambda _: False)[3]
    assert everything > 15
    outcomes = []
    for last in range(everything):
        run, states, replay, _ = saved(tmp_path / str(last), lambda index, last=last: index >= last)
        again = Run(run.folder)
        found = again.load("replay")
        outcomes.append(again.load("trainer")["steps"])
        assert same(dict(found), states[-1] if outcomes[-1] == 3 else states[-2])
        # The next checkpoint clears up, and the one before it loads as well.
        resumed = Replay(*IMAGES, 2, replay.config)
        resumed.load_state_dict(found)
        again.save(4, {"replay": resumed.state_dict(), "trainer": {"steps": 4}})
        assert same(dict(again.load("replay")), state_of(resumed))
        assert len(again.checkpoints) == 2 and not list(again.folder.rglob("*.partial*"))
        listed = {name for folder in again.checkpoints for name in segments._listed(folder / "replay.safetensors")}
        assert {path.stem for path in (again.folder / "replay").iterdir()} == listed
        again.checkpoints[-1].rename(again.folder / "gone")
        assert same(dict(again.load("replay")), dict(found))
    assert set(outcomes) == {1 if replace else 2, 3} and outcomes == sorted(outcomes)


def test_two_replays_of_one_checkpoint_never_share_what_differs(tmp_path: Path) -> None:
    run, filled = new_run(tmp_path), Filled(1, ReplayConfig(window=16, burn_in=2))
    filled.steps(5)
    run.save(1, {"replay": filled.replay.state_dict()})
    loaded = run.load("replay")
    others = []
    for seed in (1, 2):
        other = Filled(1, filled.replay.config, seed)
        other.replay.load_state_dict(loaded)
        others.append(other)
    for steps, other in enumerate([*others, *others, filled], 2):
        other.steps(3)
        run.save(steps, {"replay": other.replay.state_dict()})
        assert same(dict(run.load("replay")), state_of(other.replay))
    elsewhere = new_run(tmp_path / "elsewhere")
    elsewhere.save(1, {"replay": filled.replay.state_dict()})
    assert same(dict(elsewhere.load("replay")), state_of(filled.replay))


def test_a_segment_that_is_missing_damaged_or_another_is_named(tmp_path: Path) -> None:
    run, filled = new_run(tmp_path), Filled(1, ReplayConfig(window=16, burn_in=2))
    for steps in (1, 2):
        filled.steps(5)
        run.save(steps, {"replay": filled.replay.state_dict()})
    one, other = sorted((run.folder / "replay").iterdir())
    content = one.read_bytes()
    for change, words in (
        (lambda: one.write_bytes(content[:-1]), f"{one} is damaged"),
        (lambda: one.write_bytes(other.read_bytes()), "it is another file than its name says"),
        (one.unlink, f"{one} is missing"),
        (lambda: one.symlink_to(other), "is a symbolic link"),
    ):
        change()
        with pytest.raises(RunError, match=words):
            run.load("replay")
    # The replay in memory is whole, and so is its next checkpoint.
    filled.steps(1)
    run.save(3, {"replay": filled.replay.state_dict()})
    assert same(dict(run.load("replay")), state_of(filled.replay))


def test_a_resumed_replay_with_states_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    config = ReplayConfig(batch_size=3, window=11, burn_in=3, max_steps=300)
    recorder, run = Recorder(single(3, 40), config), new_run(tmp_path)
    for steps in range(1, 14):
        for _ in range(12):
            recorder.step()
        run.save(steps, {"replay": recorder.replay.state_dict()})
    again = Replay(recorder.replay.observation_spec, recorder.replay.action_spec, 3, config, STATE)
    again.load_state_dict(run.load("replay"))
    assert again.nbytes == recorder.replay.nbytes
    for _ in range(20):
        assert_same(recorder.replay.sample(7)[0], again.sample(7)[0])


HUGE = {"zlib": np.zeros(9, np.uint8), "dtype": "u1", "shape": [10**12]}


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ({"segments": [{"checksum": "../../elsewhere", "size": 1}]}, "expected a checksum"),
        ({"packs": [{"x": {"slices": np.array([[7, 0, 3]]), "rows": np.zeros(2)}}]}, "another number of rows"),
        ({"packs": [{"x": {"slices": np.array([[7, 1, 2]]), "rows": np.zeros(2)}}]}, "missing or there twice"),
        ({"packs": [{"x": {"slices": np.array([[7, 0, 1]]), "rows": HUGE}}]}, "cannot have 9 bytes"),
    ],
    ids=["another file", "too few rows", "a gap", "more than can be"],
)
def test_what_cannot_be_sequences_is_damaged(tmp_path: Path, listed: dict[str, Any], words: str) -> None:
    run = new_run(tmp_path)
    found = {"ids": np.array([7]), "growing": [], **listed}
    checkpoint = run.save(1, {"replay": {}})
    storage.save(
        checkpoint / "replay.safetensors", {"sequences": sequences.Sequences([7], [], lambda _: {})}, lambda _: found
    )
    with pytest.raises(RunError, match=f"replay.safetensors is damaged: ValueError: .*{words}"):
        run.load("replay")


def test_a_link_in_the_place_of_the_segments_is_not_followed(tmp_path: Path) -> None:
    run, filled = new_run(tmp_path), Filled(1, ReplayConfig(window=16, burn_in=2))
    (tmp_path / "elsewhere").mkdir()
    (run.folder / "replay").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="replay is a symbolic link"):
        run.save(1, {"replay": filled.replay.state_dict()})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_step_before_the_first_observation_is_refused() -> None:
    filled = Filled(2, ReplayConfig(window=16, burn_in=2))
    ended = np.ones(2, bool)
    filled.replay.add(np.arange(2), np.zeros(2, int), np.zeros(2), ended, ended, filled.frames())
    with pytest.raises(RuntimeError, match=r"environment 0 has no first observation; Replay\.begin takes it"):
        filled.steps(1)

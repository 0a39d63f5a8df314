"""LeRobot folders of formats 2 and 3: rows are those that were written, and what is wrong is told with its place."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from worldmodel.data.datasets import RecordedSource
from worldmodel.data.lerobot_episodes import LeRobotEpisodes
from worldmodel.data.selection import SelectedEpisodes, open_episodes
from worldmodel.runs.files import RunError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LENGTHS, FPS, SIDE = [4, 6, 3], 10, 16
STARTS = np.cumsum(LENGTHS) - LENGTHS
STEPS = sum(LENGTHS)
RANDOM = np.random.default_rng(0)
STATE = RANDOM.normal(size=(STEPS, 3)).astype(np.float32)
ACTION = RANDOM.uniform([-3, 0], [5, 1], (STEPS, 2)).astype(np.float32)
GREY = (np.arange(STEPS) * 17 % 256).astype(np.uint8)  # of each step's picture
PICTURES = np.broadcast_to(GREY[:, None, None, None], (STEPS, SIDE, SIDE, 3))
STATES = {"dtype": "float32", "shape": [3], "names": ["motors"]}
ACTIONS = {"dtype": "float32", "shape": [2], "names": ["motors"]}


def write_info(folder, version, picture, **paths):
    (folder / "meta").mkdir(parents=True)
    features = {"observation.state": STATES, "observation.images.top": picture, "action": ACTIONS, "reward": STATES}
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 2, "features": features, **paths}
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def write_table(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)


def png(picture):
    imageio = pytest.importorskip("imageio.v3")
    file = io.BytesIO()
    imageio.imwrite(file, picture, extension=".png")
    return file.getvalue()


def second_format(
    folder, action=ACTION, lengths=LENGTHS, data="data/chunk-{episode_chunk:03d}/{episode_index}.parquet"
):
    picture = {"dtype": "image", "shape": [3, SIDE, SIDE], "names": ["channels", "height", "width"]}
    write_info(folder, "v2.1", picture, data_path=data, video_path=None)
    told = [{"episode_index": episode, "length": length} for episode, length in enumerate(lengths)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(json.dumps(one) for one in reversed(told)))
    for episode, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        here = slice(start, start + length)
        cells = [{"bytes": png(one), "path": None} for one in PICTURES[here]]
        columns = {"observation.state": STATE[here].tolist(), "action": action[here].tolist()}
        path = folder / f"data/chunk-{episode // 2:03d}" / f"{episode}.parquet"
        write_table(path, {**columns, "observation.images.top": cells}, row_group_size=2)
    return folder


def third_format(folder):
    av = pytest.importorskip("av")
    picture = {"dtype": "video", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    write_info(folder, "v3.0", picture, **paths)
    write_table(
        folder / paths["data_path"].format(chunk_index=0, file_index=1),
        {"observation.state": STATE.tolist(), "action": ACTION.tolist()},
        row_group_size=5,
    )
    video = "videos/observation.images.top/"
    write_table(
        folder / "meta/episodes/chunk-000/file-000.parquet",
        {
            "episode_index": [0, 1, 2],
            "length": LENGTHS,
            "data/chunk_index": [0] * 3,
            "data/file_index": [1] * 3,
            f"{video}chunk_index": [0] * 3,
            f"{video}file_index": [0] * 3,
            f"{video}from_timestamp": (STARTS / FPS).tolist(),
        },
    )
    path = folder / paths["video_path"].format(video_key="observation.images.top", chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = SIDE, SIDE, "yuv420p", 4
        for one in PICTURES:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(one), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return folder


@pytest.mark.parametrize(("write", "slack"), [(second_format, 0), (third_format, 12)])
def test_rows_are_those_that_were_written(tmp_path, write, slack):
    (file,) = open_episodes(write(tmp_path / "set"))
    assert isinstance(file, LeRobotEpisodes) and (file.steps, file.episodes) == (STEPS, 3)
    assert sorted(file.observation_spec.modalities) == ["images_top", "state"]
    for every in (1, 2):
        rows = file.rows(np.array([1, 5]), 8, every)
        for row, start in enumerate((1, 5)):
            here = np.arange(start, start + 8)
            assert np.array_equal(rows["observations/state"][row], STATE[here[::every]])
            found = rows["observations/images_top"][row].astype(int)
            assert np.abs(found - PICTURES[here[::every]]).max() <= slack
            last = np.isin(here, STARTS + LENGTHS - 1)
            taken = file.action_spec.to_env(rows["actions"][row])
            assert np.allclose(taken[~last], ACTION[here][~last], atol=1e-5) and not rows["actions"][row][last].any()
            assert np.array_equal(rows["is_last"][row], last)
            assert np.array_equal(rows["is_first"][row], np.isin(here, STARTS))
    batch, _ = RecordedSource(SelectedEpisodes([file], None, 2, phases=2), batch_size=2, window=3).sample()
    assert batch.actions.shape == (2, 3, 4)


def test_features_are_chosen_by_name(tmp_path):
    (file,) = open_episodes(second_format(tmp_path / "set"), ["observation.state"])
    assert list(file.observation_spec.modalities) == ["state"]
    with pytest.raises(
        RunError, match=r"set has no feature observation\.stat, expected one of observation\.state, obs"
    ):
        open_episodes(tmp_path / "set", ["observation.stat"])


def test_what_is_wrong_is_told_with_file_episode_and_step(tmp_path):
    missing = ACTION.copy()
    missing[6, 1] = np.nan
    with pytest.raises(RunError, match="a: episode 1, step 2: the action is missing or infinite"):
        open_episodes(second_format(tmp_path / "a", missing))
    last = ACTION.copy()
    last[12] = np.nan  # of a last step, which is not read
    open_episodes(second_format(tmp_path / "b", last))
    with pytest.raises(RunError, match="c: episode 2: it has 1 steps, expected two at least"):
        open_episodes(second_format(tmp_path / "c", lengths=[4, 6, 1]))
    with pytest.raises(RunError, match=r"2\.parquet: episode 2: it ends at row 9 of 3"):
        open_episodes(second_format(tmp_path / "d", lengths=[4, 6, 9]))
    with pytest.raises(RunError, match=r"names \.\./away\.parquet, expected a file in the folder"):
        open_episodes(second_format(tmp_path / "e", data="../away.parquet"))
    (tmp_path / "b" / "data" / "chunk-001" / "2.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"2\.parquet"):
        open_episodes(tmp_path / "b")
    info = json.loads((tmp_path / "c" / "meta" / "info.json").read_text())
    for changed, said in (
        ({"codebase_version": "v1.6"}, "its version is v1.6, expected 2 or 3"),
        ({"fps": None}, ""),
    ):
        (tmp_path / "c" / "meta" / "info.json").write_text(json.dumps({**info, **changed}))
        with pytest.raises(RunError, match=rf"info\.json.*{said}"):
            open_episodes(Path(tmp_path / "c"))

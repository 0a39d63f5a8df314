"""Videos of episodes: rendering, observations, reconstructions."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.acting.agent import Agent
from worldmodel.environments import calls
from worldmodel.environments.registry import EnvironmentFailed, make
from worldmodel.pictures.renderers import Renderer, renderer
from worldmodel.runs.optional_dependencies import missing, require

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

_log = logging.getLogger(__name__)

FRAMES_PER_SECOND = 30
_MIN_HEIGHT, _MAX_HEIGHT = 256, 512  # pixels
_LINE, _SPACE = 24, 8  # pixels: text line, gap
_PAPER, _INK, _PALE = (255, 255, 255), (36, 41, 47), (110, 119, 129)


class NoVideo(ValueError):
    """No rendering, or an unsupported file type."""


def video_file(wanted: Path) -> tuple[Path, str]:
    """Returns the path and a notice: without imageio-ffmpeg, a GIF replaces an mp4.

    Raises NoVideo for another file type, MissingPackage without imageio.
    """
    require("imageio.v2", "write videos")
    if wanted.suffix not in (".mp4", ".gif"):
        raise NoVideo(f"video is {wanted}, expected a name that ends in .mp4 or .gif")
    if wanted.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        said = "imageio-ffmpeg is not installed, so the video is a GIF and no mp4 (pip install imageio-ffmpeg)"
        return wanted.with_suffix(".gif"), said
    return wanted, ""


def make_rendered(name: str, /, **options: Any) -> "gymnasium.Env[Any, Any]":
    """Makes and tries an environment with ``rgb_array`` rendering; raises NoVideo, or the errors of ``make``."""
    plain = make(name, **options)
    modes = list(plain.metadata.get("render_modes") or [])
    plain.close()
    if "rgb_array" not in modes:
        known = f"its render modes are {', '.join(map(str, modes))}" if modes else "it has no render modes"
        raise NoVideo(f"environment {name!r} cannot be rendered as rgb_array: {known}")
    try:
        environment = make(name, **{**options, "render_mode": "rgb_array"})
    except EnvironmentFailed as failure:
        raise NoVideo(f"environment {name!r} cannot be rendered as rgb_array: {failure}") from failure
    try:
        environment.reset(seed=0)
        frame = environment.render()
    except Exception as failure:
        environment.close()
        said = calls.told(failure)
        raise NoVideo(f"environment {name!r} cannot be rendered as rgb_array: {said}") from failure
    if not _is_picture(frame):
        environment.close()
        raise NoVideo(f"environment {name!r} renders {_described(frame)} as rgb_array, expected (height, width, 3)")
    return environment


def _is_picture(frame: Any) -> bool:
    return isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3


def _described(frame: Any) -> str:
    return f"shape {frame.shape}" if isinstance(frame, np.ndarray) else f"a {type(frame).__name__}"


@contextlib.contextmanager
def writer(path: Path, fps: float) -> Iterator[Any]:
    """A video file, whose ``append_data`` takes frames, uint8 (height, width, 3) with even sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio = require("imageio.v2", "write videos")
    options: dict[str, Any] = {"duration": 1000 / fps, "loop": 0}
    if path.suffix == ".mp4":
        options = {"format": "FFMPEG", "fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2}
    with imageio.get_writer(path, mode="I", **options) as file:
        yield file


class Camera(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Films the first ``episodes`` episodes of ``environment`` into ``film``, a ``writer``.

    The film ends, with a warning in the log, where ``render`` fails or returns another kind of picture than before.
    """

    def __init__(self, environment: "gymnasium.Env[Any, Any]", agent: Agent, episodes: int, film: Any) -> None:
        super().__init__(environment)
        self._agent, self._episodes, self._film = agent, episodes, film
        modalities = agent.observation_spec.modalities
        found = ((name, renderer(modality, environment)) for name, modality in modalities.items())
        self._renderers: dict[str, Renderer] = {name: drawn for name, drawn in found if drawn is not None}
        self._begun = self._frames = 0
        self._first: np.ndarray | None = None  # rendering
        self._ended = False
        image_font = require("PIL.ImageFont", "write videos")
        self._font = image_font.load_default(14)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self._begun += 1
        self._seed, self._step, self._return = options.get("seed"), 0, 0.0
        self._shoot(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._step += 1
        self._return += calls.scalar("reward", reward)
        self._shoot(observation)
        return observation, reward, terminated, truncated, info

    def _shoot(self, observation: Any) -> None:
        if self._ended or self._begun > self._episodes:
            return
        try:
            rendering = self._rendering()
        except NoVideo as problem:
            self._ended = True
            where = f"step {self._step} of the episode with seed {self._seed}"
            _log.warning("the video ends after %d frames, at %s: %s", self._frames, where, problem)
            return
        self._film.append_data(self._page(rendering, observation))
        self._frames += 1

    def _rendering(self) -> np.ndarray:
        try:
            rendering = self.env.render()
        except Exception as error:
            raise NoVideo(calls.told(error)) from error
        if not isinstance(rendering, np.ndarray) or not _is_picture(rendering):
            raise NoVideo(f"render() returned {_described(rendering)}, expected (height, width, 3)")
        first = rendering if self._first is None else self._first
        if (rendering.shape, rendering.dtype) != (first.shape, first.dtype):
            raise NoVideo(
                f"render() returned shape {rendering.shape} and dtype {rendering.dtype}, expected {first.shape} and "
                f"{first.dtype} as at first"
            )
        self._first = first
        return rendering

    def _page(self, rendering: np.ndarray, observation: Any) -> np.ndarray:
        pictures = [("environment", _scaled(rendering, min(max(len(rendering), _MIN_HEIGHT), _MAX_HEIGHT)))]
        height = len(pictures[0][1])
        pictures += [(title, _scaled(picture, height)) for title, picture in self._views(observation)]
        image_module, draw_module = (require(f"PIL.{part}", "write videos") for part in ("Image", "ImageDraw"))
        width = sum(picture.shape[1] + _SPACE for _, picture in pictures) + _SPACE
        size = (max(width, 420), height + 2 * _LINE + _SPACE)
        page = image_module.new("RGB", tuple(-(-side // 2) * 2 for side in size), _PAPER)
        pen = draw_module.Draw(page)
        text = f"episode {self._begun} of {self._episodes}, seed {self._seed}, step {self._step}"
        pen.text((_SPACE, 4), f"{text}, return {self._return:.4g}", fill=_INK, font=self._font)
        left = _SPACE
        for title, picture in pictures:
            pen.text((left, _LINE + 2), title, fill=_PALE, font=self._font)
            page.paste(image_module.fromarray(picture), (left, 2 * _LINE))
            left += picture.shape[1] + _SPACE
        return np.asarray(page)

    @torch.no_grad()
    def _views(self, observation: Any) -> Iterator[tuple[str, np.ndarray]]:
        if not self._renderers:
            return
        spec, perception = self._agent.observation_spec, self._agent.world_model.perception
        encoded = {name: array[None] for name, array in spec.encode(observation).items()}
        posterior = perception(spec.to_tensors(encoded, self._agent.device))
        made = perception.reconstruct(perception.latent.mode(posterior)) if perception.latent.decodes else {}
        for name, drawn in self._renderers.items():
            own = "" if len(self._renderers) == 1 else f" of {name}"
            yield f"what it sees{own}", drawn.render(encoded[name][0])
            if name in made:
                yield f"reconstructed{own}", drawn.render(made[name][0].cpu().numpy(), encoded[name][0])


def _scaled(picture: np.ndarray, height: int) -> np.ndarray:
    image = require("PIL.Image", "write videos")
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    how = image.Resampling.NEAREST if height >= picture.shape[0] else image.Resampling.LANCZOS
    return np.asarray(image.fromarray(np.ascontiguousarray(picture, np.uint8)).resize((width, height), how))

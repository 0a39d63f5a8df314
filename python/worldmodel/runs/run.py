"""A run's folder: configuration, metrics and checkpoints.

    config.json          settings, the environment's specs, versions
    metrics.jsonl        a line every few seconds
    tensorboard/         the same
    checkpoints/NNN/     after NNN transitions; one safetensors file per part

Reading a run executes nothing from it, except with ``--unpickle``; it imports the modules that its environment and
``CustomBlock`` name.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wmkernels
from worldmodel.runs import storage
from worldmodel.runs.migration import load_part, upgrade_config
from worldmodel.runs.optional_dependencies import MissingPackage, require

FORMAT = 2  # of config.json
KEPT = 2  # the newest may be damaged


class RunError(ValueError):
    """There is no run, or it cannot be resumed."""


class Run:
    """An existing run. Raises RunError if its configuration is missing, damaged or of another version."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "config.json"
        if not path.is_file():
            raise RunError(f"{self.folder} is not the folder of a run: {path} is missing")
        try:
            self.config: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}") from error
        found = self.config.get("format") if isinstance(self.config, dict) else None
        if not (isinstance(found, int) and 1 <= found <= FORMAT):
            raise RunError(f"{path} has format {found}, this release reads formats 1 to {FORMAT}")
        self.config = {**upgrade_config(self.config), "format": FORMAT}
        self._tensorboard: Any = None

    @classmethod
    def create(cls, folder: Path | str, config: Mapping[str, Any]) -> "Run":
        """A new run with ``config``. Raises RunError if the folder is not empty."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} exists and is not empty; go on with it by --resume {folder}, or name another")
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"wmkernels": wmkernels.__version__, "torch": torch.__version__}
        _write_text(folder / "config.json", json.dumps({"format": FORMAT, "versions": versions, **config}, indent=1))
        return cls(folder)

    def configure(self, config: Mapping[str, Any]) -> None:
        _write_text(self.folder / "config.json", json.dumps(config, indent=1))
        self.config = dict(config)

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted(path for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit())

    def save(self, steps: int, parts: Mapping[str, Any], *, replace: bool = False) -> Path:
        """Writes ``parts``, name -> state for ``storage.save``; keeps the newest ``KEPT``.

        Returns its folder, renamed once the files are on disk: each is complete. Raises OSError for a full disk; the
        older checkpoints are then as they were. A checkpoint of these ``steps`` stays, unless ``replace`` is true.
        """
        final = self.folder / "checkpoints" / f"{steps:012d}"
        if final.exists() and not replace:
            return final
        final.parent.mkdir(exist_ok=True)
        for left_over in final.parent.glob("*.partial"):
            shutil.rmtree(left_over)
        beside = final.with_name(final.name + ".partial")
        try:
            beside.mkdir()
            for name, state in parts.items():
                storage.save(beside / f"{name}.safetensors", state)
            _sync(beside)
            if final.exists():
                final.rename(final.with_name(final.name + ".old.partial"))
            beside.rename(final)
        except BaseException:  # a full disk, or Ctrl-C
            shutil.rmtree(beside, ignore_errors=True)
            raise
        _sync(final.parent)
        shutil.rmtree(final.with_name(final.name + ".old.partial"), ignore_errors=True)
        for old in self.checkpoints[:-KEPT]:
            shutil.rmtree(old)
        return final

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """One part of the newest checkpoint. Raises RunError if it is missing or damaged."""
        if not self.checkpoints:
            raise RunError(f"{self.folder} has no checkpoint yet")
        *older, newest = self.checkpoints

        def read(part: str) -> tuple[Any, int]:
            return storage.load_versioned(newest / f"{part}.safetensors", device)

        try:
            return load_part(name, read, lambda part: (newest / f"{part}.safetensors").is_file())
        except storage.NewerFile as error:
            raise RunError(str(error)) from error
        except (storage.DamagedFile, FileNotFoundError) as error:
            hint = f"; remove {newest} to go on from {older[-1].name}, the checkpoint before it" if older else ""
            raise RunError(f"{error}{hint}") from error

    def load_weights(self, module: nn.Module, device: torch.device | str = "cpu", part: str = "world_model") -> None:
        """Loads the newest checkpoint's weights. Raises RunError as well for another configuration."""
        saved = self.load(part, device)
        present = module.state_dict()
        found = [f"{name} is missing" for name in present if name not in saved]
        found += [f"{name} is not known here" for name in saved if name not in present]
        found += [
            f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(value.shape)}"
            for name, value in present.items()
            if name in saved and saved[name].shape != value.shape
        ]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise RunError(
                f"{self.checkpoints[-1]} holds the weights of another configuration: {'; '.join(found[:3])}{more}"
            )
        module.load_state_dict(saved)

    @contextlib.contextmanager
    def refusing(self, *parts: str) -> Iterator[None]:
        """Turns errors of loading ``parts`` into ``RunError``."""
        try:
            yield
        except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RunError(
                f"{self.checkpoints[-1]} does not fit this configuration, in {', '.join(parts)}: {reason}"
            ) from error

    def log(self, metrics: Mapping[str, float]) -> None:
        """Appends ``metrics``, among them "steps", to ``metrics.jsonl`` and TensorBoard.

        Raises OSError for a full disk, without half a line in ``metrics.jsonl``.
        """
        _append(self.folder / "metrics.jsonl", json.dumps(dict(metrics)) + "\n")
        steps = int(metrics["steps"])
        with self._writer(steps) as writer:
            for name, value in metrics.items() if writer else ():
                if name != "steps":
                    writer.add_scalar(name, value, steps)

    def log_picture(self, name: str, picture: np.ndarray, steps: int) -> None:
        """``picture`` is uint8 (height, width, 3). Raises OSError for a full disk."""
        with self._writer(steps) as writer:
            if writer:
                writer.add_image(name, picture, steps, dataformats="HWC")

    @contextlib.contextmanager
    def _writer(self, steps: int) -> Iterator[Any]:
        """False without TensorBoard; after an OSError the next call begins another file."""
        try:
            if self._tensorboard is None:
                self._tensorboard = self._open_tensorboard(steps)
            yield self._tensorboard
            if self._tensorboard:
                self._tensorboard.flush()  # its thread's errors appear here
        except OSError:
            self.close()
            raise

    def _open_tensorboard(self, steps: int) -> Any:
        try:
            writer = require("torch.utils.tensorboard", "write for TensorBoard").SummaryWriter
        except MissingPackage:
            return False
        return writer(str(self.folder / "tensorboard"), purge_step=steps)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Complete lines of ``metrics.jsonl``."""
        path = self.folder / "metrics.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def forget_metrics_after(self, steps: int) -> None:
        kept = [json.dumps(line) + "\n" for line in self.metrics if line["steps"] <= steps]
        _write_text(self.folder / "metrics.jsonl", "".join(kept))

    def close(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer:
            with contextlib.suppress(OSError):  # a full disk, reported when it was written to
                writer.close()


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_text(text)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _append(path: Path, line: str) -> None:
    """Appends all of ``line`` or nothing."""
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(line.encode())
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                file.close()  # its buffer cannot be written either
            os.truncate(path, size)
            raise


def _sync(folder: Path) -> None:
    """A rename is durable only once its folder is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

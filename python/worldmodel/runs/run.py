"""A run's folder: configuration, metrics and checkpoints.

    config.json          settings, the environment's specs, versions
    metrics.jsonl        a line every few seconds
    tensorboard/         the same
    checkpoints/NNN/     after NNN transitions; one safetensors file per part
    best/                weights of the best evaluation, and evaluation.json
    replay/              segments that the checkpoints share, with what grows
    lock                 held by the process that writes the run

Reading a run executes nothing from it, except with ``--unpickle``; of the modules that its environment and
``CustomBlock`` name, it imports those that are installed (``trust.py``).
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wmkernels
from worldmodel.runs import files, storage
from worldmodel.runs.files import RunError
from worldmodel.runs.lock import LOCK, Lock
from worldmodel.runs.migration import load_part, upgrade_config
from worldmodel.runs.optional_dependencies import MissingPackage, require
from worldmodel.runs.segments import Segments

__all__ = ["Run", "RunError"]

FORMAT = 2  # of config.json
KEPT = 2  # the newest may be damaged
_COMMANDS = {"imitation": "imitate", "world": "train-world"}  # by the part of config.json that is theirs alone
_BEST_BY = ("eval/return", "held_out/action")
_REPLACED = ".old.partial"
_MOST_METRICS = 2**28  # bytes of metrics.jsonl: a line every five seconds for three weeks
_MOST_NAMED = 9999  # of the numbers that make a folder's name unique


class Run:
    """An existing run. Raises RunError if its configuration is missing, damaged or of another version."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "config.json"
        try:
            config = files.read_json(path)
        except FileNotFoundError as error:
            raise RunError(f"{self.folder} is not the folder of a run: {path} is missing") from error
        except NotADirectoryError as error:
            raise RunError(f"{self.folder} is not the folder of a run, but a file") from error
        found = config.get("format") if isinstance(config, dict) else None
        if not (type(found) is int and 1 <= found <= FORMAT):
            raise RunError(f"{path} has format {found!r:.80}, this release reads formats 1 to {FORMAT}")
        try:
            self.config: dict[str, Any] = {**upgrade_config(config), "format": FORMAT}
        except (AttributeError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged: it has no settings of format {found}") from error
        self._tensorboard: Any = None
        self._lock: Lock | None = None
        self._reads_best = False

    @property
    def command(self) -> str:
        """The command that made it: train, train-world or imitate."""
        return next((name for part, name in _COMMANDS.items() if isinstance(self.config.get(part), dict)), "train")

    @classmethod
    def at_best(cls, folder: Path | str) -> "Run":
        """The run, of which ``load`` reads the weights of the best evaluation. Raises RunError as well without one."""
        run = cls(folder)
        if run.best is None:
            measured = "training evaluates every --eval-minutes, where the policy acts"
            if run.command == "imitate":
                measured = "no loss on held-out episodes was measured"
            raise RunError(f"{run.folder} has no best checkpoint: {measured}")
        run._reads_best = True
        return run

    @classmethod
    def create(cls, folder: Path | str, config: Mapping[str, Any], *, numbered: bool = False) -> "Run":
        """A new run with ``config``, which this process writes until ``close``.

        With ``numbered`` another name is taken if there is a ``folder`` already: FOLDER-2, FOLDER-3, ...

        Raises RunError if the folder is not empty, or another process begins a run in it.
        """
        folder = _made_folder(Path(folder)) if numbered else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _check_empty(folder)
        lock = Lock(folder)
        _check_empty(folder)  # another run may have begun and ended
        versions = {"wmkernels": wmkernels.__version__, "torch": torch.__version__}
        files.write_text(
            folder / "config.json", json.dumps({"format": FORMAT, "versions": versions, **config}, indent=1)
        )
        run = cls(folder)
        run._lock = lock
        return run

    @classmethod
    def open_to_write(cls, folder: Path | str) -> "Run":
        """An existing run, which this process alone writes until ``close``. Raises RunError as well if another does."""
        run = cls(folder)
        lock = Lock(run.folder)
        run = cls(folder)  # as it is now that nobody else writes it
        run._lock = lock
        return run

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Where to write ``path``: in the run's folder a new file that replaces it, elsewhere the path itself.

        What the user names elsewhere may be a link or a device.
        """
        if path.parent.resolve().is_relative_to(self.folder.resolve()):
            with files.replacing(path) as beside:
                yield beside
        else:
            yield path

    def configure(self, config: Mapping[str, Any]) -> None:
        files.write_text(self.folder / "config.json", json.dumps(config, indent=1))
        self.config = dict(config)

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first. Raises RunError for links among them."""
        found = [path for path in self._own("checkpoints").glob("*") if path.name.isascii() and path.name.isdigit()]
        if link := next((path for path in found if path.is_symlink()), None):
            raise files.linked(link)
        names = {path.name for path in found}
        replaced = self._own("checkpoints").glob(f"*{_REPLACED}")  # a kill came before what replaces it
        return sorted([*found, *(path for path in replaced if path.name.removesuffix(_REPLACED) not in names)])

    @property
    def best(self) -> Path | None:
        """Folder of the weights of the best evaluation. Raises RunError if it is a link."""
        folder, replaced = self._own("best"), self._own(f"best{_REPLACED}")
        return next((path for path in (folder, replaced) if path.is_dir()), None)

    @property
    def best_evaluation(self) -> dict[str, Any] | None:
        """What ``save_best`` wrote. Raises RunError if it is damaged."""
        if self.best is None:
            return None
        path = self.best / "evaluation.json"
        try:
            found = files.read_json(path)
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict) or not any(isinstance(found.get(name), int | float) for name in _BEST_BY):
            raise RunError(f"{path} is damaged: it has no {' or '.join(_BEST_BY)}")
        return found

    def save_best(self, parts: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
        """Writes weights, and what was measured with them, in place of those before. Raises OSError for a full disk."""
        final = self._own("best")
        beside, replaced = (final.with_name(f"best{suffix}") for suffix in (".partial", _REPLACED))
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)  # a kill came after what replaces it
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            for name, state in parts.items():
                storage.save(beside / f"{files.check_part_name(name)}.safetensors", state)
            files.write_text(beside / "evaluation.json", json.dumps(dict(evaluation), indent=1) + "\n")
            files.sync_folder(beside)
            if final.exists():
                final.rename(replaced)
            beside.rename(final)
        except BaseException:  # a full disk, or Ctrl-C
            shutil.rmtree(beside, ignore_errors=True)
            raise
        files.sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _own(self, name: str) -> Path:
        """A folder of this run. Raises RunError if it is a link."""
        path = self.folder / name
        if path.is_symlink():
            raise files.linked(path)
        return path

    def save(self, steps: int, parts: Mapping[str, Any], *, replace: bool = False) -> Path:
        """Writes ``parts``, name -> state for ``storage.save``; keeps the newest ``KEPT``.

        Returns its folder, renamed once the files are on disk: each is complete. Raises OSError for a full disk; the
        older checkpoints are then as they were. A checkpoint of these ``steps`` stays, unless ``replace`` is true.
        """
        final = self._own("checkpoints") / f"{steps:012d}"
        for kept in self.checkpoints:
            if kept.name.endswith(_REPLACED):
                kept.rename(kept.with_name(kept.name.removesuffix(_REPLACED)))
        if final.exists() and not replace:
            return final
        final.parent.mkdir(exist_ok=True)
        for left_over in final.parent.glob("*.partial"):
            _remove(left_over)
        segments = self.segments
        beside = final.with_name(final.name + ".partial")
        try:
            beside.mkdir()
            for name, state in parts.items():
                storage.save(beside / f"{files.check_part_name(name)}.safetensors", state, segments.append)
            files.sync_folder(beside)
            if final.exists():
                final.rename(final.with_name(final.name + _REPLACED))
            beside.rename(final)
        except BaseException:  # a full disk, or Ctrl-C
            shutil.rmtree(beside, ignore_errors=True)
            with contextlib.suppress(OSError, RunError):
                segments.remove_all_but(self.checkpoints)
            raise
        files.sync_folder(final.parent)
        segments.commit()
        shutil.rmtree(final.with_name(final.name + _REPLACED), ignore_errors=True)
        for old in self.checkpoints[:-KEPT]:
            shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
        segments.remove_all_but(self.checkpoints)
        return final

    @property
    def segments(self) -> Segments:
        """Files that the checkpoints share. Raises RunError if their folder is a link."""
        return Segments(self._own("replay"))

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """One part of the newest checkpoint. Raises RunError if it is missing or damaged."""
        newest = self._loaded
        older = [] if self._reads_best else self.checkpoints[:-1]

        def file(part: str) -> Path:
            return newest / f"{files.check_part_name(part)}.safetensors"

        def read(part: str) -> tuple[Any, int]:
            return storage.load_versioned(file(part), device, self.segments.read)

        try:
            return load_part(name, read, lambda part: file(part).is_file())
        except storage.NewerFile as error:
            raise RunError(str(error)) from error
        except (storage.DamagedFile, OSError) as error:
            hint = f"; remove {newest} to go on from {older[-1].name}, the checkpoint before it" if older else ""
            raise RunError(f"{error}{hint}") from error
        except (LookupError, AttributeError, TypeError) as error:
            raise RunError(
                f"{newest} has no {name} of its version: {type(error).__name__}: {files.shown(error, 400)}"
            ) from error

    @property
    def _loaded(self) -> Path:
        """The checkpoint that ``load`` reads. Raises RunError without one."""
        found = [self.best] if self._reads_best and self.best is not None else self.checkpoints
        if not found:
            raise RunError(f"{self.folder} has no checkpoint yet")
        return found[-1]

    def load_weights(self, module: nn.Module, device: torch.device | str = "cpu", part: str = "world_model") -> None:
        """Loads the newest checkpoint's weights. Raises RunError as well for another configuration."""
        module.load_state_dict(self.weights_of(module, device, part))

    def weights_of(
        self, module: nn.Module, device: torch.device | str = "cpu", part: str = "world_model"
    ) -> dict[str, torch.Tensor]:
        """The newest checkpoint's weights for ``module``, which may be without memory, on the device "meta".

        Raises RunError as ``load``, or if its tensors are not those of the checkpoint.
        """
        saved = self.load_tensors(part, device)
        present = module.state_dict()
        found = [f"{name} is missing" for name in present if name not in saved]
        found += [f"{files.shown(name)} is not known here" for name in saved if name not in present]
        for name, value in present.items():
            there = saved.get(name, value)
            if there.shape != value.shape:
                found.append(f"{name} has shape {tuple(there.shape)}, expected {tuple(value.shape)}")
            elif there.dtype != value.dtype:
                found.append(f"{name} has dtype {there.dtype}, expected {value.dtype}")
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise RunError(f"{self._loaded} holds the weights of another configuration: {'; '.join(found[:3])}{more}")
        return saved

    def load_tensors(self, part: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """A part that is a dict of tensors, without NaN and infinity. Raises RunError."""
        saved, checkpoint = self.load(part, device), self._loaded
        if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
            raise RunError(f"{checkpoint} has no dict of tensors as its part {part}")
        for name, value in saved.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise RunError(f"{checkpoint} has NaN or infinity in {part}, tensor {files.shown(name)}")
        return saved

    @contextlib.contextmanager
    def refusing(self, *parts: str) -> Iterator[None]:
        """Turns errors of loading ``parts`` into ``RunError``."""
        try:
            yield
        except RunError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {files.shown(error, 400)}"
            raise RunError(
                f"{self._loaded} does not fit this configuration, in {', '.join(parts)}: {reason}"
            ) from error

    def log(self, metrics: Mapping[str, float]) -> None:
        """Appends ``metrics``, among them "steps", to ``metrics.jsonl`` and TensorBoard.

        Raises OSError for a full disk, without half a line in ``metrics.jsonl``.
        """
        files.append(self.folder / "metrics.jsonl", json.dumps(dict(metrics)) + "\n")
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
            self._close_tensorboard()
            raise

    def _open_tensorboard(self, steps: int) -> Any:
        try:
            writer = require("torch.utils.tensorboard", "write for TensorBoard").SummaryWriter
        except MissingPackage:
            return False
        folder = self._own("tensorboard")
        if link := next((path for path in folder.glob("*") if path.is_symlink()), None):
            raise files.linked(link)
        return writer(str(folder), purge_step=steps)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Complete lines of ``metrics.jsonl``, from the first to the last that is one. Raises RunError for a link."""
        found: list[dict[str, float]] = []
        try:
            content = files.read(self.folder / "metrics.jsonl", _MOST_METRICS)
        except FileNotFoundError:
            return found
        for line in content.splitlines():
            try:
                metrics = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(metrics, dict) or type(metrics.get("steps")) is not int:
                break
            found.append(metrics)
        return found

    def forget_metrics_after(self, steps: int) -> None:
        kept = [json.dumps(line) + "\n" for line in self.metrics if line["steps"] <= steps]
        files.write_text(self.folder / "metrics.jsonl", "".join(kept))

    def close(self) -> None:
        """Ends writing: another process may write the run."""
        self._close_tensorboard()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _close_tensorboard(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer:
            with contextlib.suppress(OSError):  # a full disk, reported when it was written to
                writer.close()


def _check_empty(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise RunError(f"{folder} exists and is not empty; go on with it by --resume {folder}, or name another")


def _made_folder(wanted: Path) -> Path:
    """``wanted``, or it with the first number that makes a new folder."""
    for number in range(1, _MOST_NAMED):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise RunError(f"{wanted} and {_MOST_NAMED - 1:,} numbered ones exist: name another by --run")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

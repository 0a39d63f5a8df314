"""One run: a memory trained for minutes of one core, then measured."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import rates
from text import corpus, recall
from text.models import MEMORIES, Model, Settings, build
from wmkernels.nn import no_decay_parameters

LENGTH = 256  # bytes that training sees at once
MULTIPLES = (1, 2, 4, 8, 16)
ROWS = 4  # of a batch: small, for more updates in the same minutes
WINDOWS = 48  # measured
SEED_OF_TUNING = 1000


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: ``sizes`` are classes, layers and parameters; ``grid`` has what to try first, by memory."""

    memories: tuple[str, ...]
    minutes: float
    sizes: tuple[int, int, int]
    grid: dict[str, dict[str, tuple[Any, ...]]]


RATES = (2e-3, 4e-3)  # tried first
TASKS = {
    "text": Task(
        tuple(MEMORIES),
        6,
        (256, 4, 500_000),
        {
            "memory attention": {"lr": RATES, "block": (32, 64)},
            "scan": {"lr": RATES, "d_state": (8, 16)},
            "rotary attention": {"lr": RATES, "heads": (4, 8)},
            "windowed attention": {"lr": RATES, "window": (64, 128)},
            "hybrid": {"lr": RATES, "window": (64, 128)},
        },
    ),
    "recall": Task(
        ("scan", "windowed attention", "hybrid"),
        2,
        (recall.CLASSES, 2, 60_000),
        {
            "scan": {"window": (recall.NEAR,), "lr": RATES, "d_state": (16, 32)},
            "windowed attention": {"window": (recall.NEAR,), "lr": RATES, "heads": (2, 4)},
            "hybrid": {"window": (recall.NEAR,), "lr": RATES, "d_state": (16, 32)},
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run. While ``tuning``, measured on the files for that."""

    task: str
    memory: str
    seed: int
    minutes: float
    settings: Settings
    tuning: bool = False

    @property
    def key(self) -> str:
        if not self.tuning:
            return f"{self.task}/{self.memory}/{self.seed}"
        names = TASKS[self.task].grid[self.memory]
        return "/".join([self.task, self.memory, *(f"{name}={getattr(self.settings, name)}" for name in names)])


def grid(task: str, memory: str, log: dict[str, Any]) -> list[Settings]:
    """The settings to try, with a learning rate beyond those in ``log`` if only the lowest or the highest is best."""
    values = TASKS[task].grid[memory]
    entries = entries_of(task, memory, log)
    known = {*values["lr"], *(entry["settings"]["lr"] for entry in entries)}
    further = rates.beyond([*((rate, None) for rate in known), *((e["settings"]["lr"], e["loss"]) for e in entries)])
    lr = sorted(known | {further}) if further is not None else sorted(known)
    choices = itertools.product(*{**values, "lr": lr}.values())
    return [Settings(**dict(zip(values, chosen, strict=True))) for chosen in choices]


def entries_of(task: str, memory: str, log: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in log.values() if (entry["task"], entry["memory"]) == (task, memory)]


def best_in(task: str, memory: str, log: dict[str, Any]) -> Settings | None:
    """Of those that did not diverge."""
    found = [entry for entry in entries_of(task, memory, log) if entry["loss"] is not None]
    return Settings(**min(found, key=lambda entry: entry["loss"])["settings"]) if found else None


def tuned(task: str, memory: str, log: dict[str, Any]) -> Settings:
    """The best settings in ``log``; the first of the grid that it has none of."""
    return best_in(task, memory, log) or grid(task, memory, log)[0]


def execute(plan: Plan, folder: Path) -> dict[str, Any]:
    """Trains and measures, in one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    classes, layers, parameters = TASKS[plan.task].sizes
    model = build(plan.memory, plan.settings, classes, layers, parameters)
    text = corpus.load() if plan.task == "text" else None
    loss_of = functools.partial(text_loss, text) if text else recall_loss
    trained = train(model, lambda: loss_of(model, generator), plan.minutes, plan.settings.lr)
    model.eval()
    with torch.no_grad():
        if text:
            measured = measure_text(model, text.tuning if plan.tuning else text.validation)
            loss = measured["whole"][0]
        else:
            measured = measure_recall(model, 7 if plan.tuning else 8)
            loss = -measured["accuracy"]
    return {
        "task": plan.task,
        "memory": plan.memory,
        "seed": plan.seed,
        "minutes": plan.minutes,
        "settings": dataclasses.asdict(plan.settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "width": model.embed.weight.shape[1],
        **({"corpus": text.description} if text else {}),
        **trained,
        "loss": loss if math.isfinite(loss) else None,
        "measured": measured,
    }


def train(model: Model, loss_of: Callable[[], Tensor], minutes: float, lr: float) -> dict[str, Any]:
    """AdamW with warm-up and a cosine over the minutes of CPU time; the mean loss of each twentieth."""
    exempt = {id(p) for p in no_decay_parameters(model)} | {id(p) for p in model.parameters() if p.dim() < 2}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in exempt], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if id(p) in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    losses: list[list[float]] = [[] for _ in range(20)]
    start, steps, spent = time.process_time(), 0, 0.0
    while spent < 1:
        share = min(1.0, spent / 0.05) * (0.1 + 0.45 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        losses[min(19, int(20 * spent))].append(loss.item())
        spent = (time.process_time() - start) / (60 * minutes)
    curve = [sum(part) / len(part) if part else None for part in losses]
    return {"updates": steps, "cpu_seconds": time.process_time() - start, "curve": curve}


def text_loss(text: corpus.Corpus, model: Model, generator: torch.Generator) -> Tensor:
    sequence = corpus.batch(text.train, ROWS, LENGTH, generator)
    return F.cross_entropy(model(sequence[:, :-1]).flatten(0, 1), sequence[:, 1:].flatten())


def recall_loss(model: Model, generator: torch.Generator) -> Tensor:
    tokens, answers, _ = recall.batch(4 * ROWS, generator)
    return F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten(), ignore_index=-1)


def measure_text(model: Model, files: list[Tensor]) -> dict[str, list[float]]:
    """Bits per byte for each of ``MULTIPLES`` of the training length as context.

    The contexts end at the same bytes: "last" is over those last ``LENGTH``, "whole" over the whole context.
    """
    found: dict[str, list[float]] = {"last": [], "whole": []}
    windows = corpus.windows(files, MULTIPLES[-1] * LENGTH, WINDOWS)
    for multiple in MULTIPLES:
        losses = []
        for rows in windows[:, -(multiple * LENGTH + 1) :].split(4):
            logits = model(rows[:, :-1])
            losses.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") / math.log(2))
        bits = torch.cat(losses)  # (windows, bytes)
        found["last"].append(bits[:, -LENGTH:].mean().item())
        found["whole"].append(bits.mean().item())
    return found


def measure_recall(model: Model, seed: int) -> dict[str, float]:
    """Accuracy of answers for keys stored within the window, beyond it, and the mean of both."""
    tokens, answers, ages = recall.batch(128, torch.Generator().manual_seed(seed))
    right = model(tokens).argmax(-1) == answers
    near, far = (right[(answers >= 0) & (near == (ages < recall.NEAR))].float().mean().item() for near in (True, False))
    return {"near": near, "far": far, "accuracy": (near + far) / 2}

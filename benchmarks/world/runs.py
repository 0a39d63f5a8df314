import contextlib
import dataclasses
import datetime
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness import environment
from world.tasks import Task
from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import evaluate
from worldmodel.learning.settings import acting_part, saved_config
from worldmodel.runs.run import Run

PASSING_EPISODES = 20  # per checkpoint


@dataclasses.dataclass(frozen=True)
class Plan:
    """One task, variant and seed.

    Attributes:
        variant: one of the task's.
        seed: of training; evaluation seeds are fixed.
        minutes: of training.
        steps: limit of environment steps.
        episodes: of evaluation.
        extra: options of ``python -m worldmodel train``.
    """

    task: Task
    variant: str
    seed: int
    minutes: float
    steps: int | None = None
    episodes: int = 100
    threads: int = 2
    device: str = "cpu"
    extra: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.task.name}/{self.variant}/{self.seed}"


def train_options(plan: Plan, folder: Path) -> list[str]:
    task = plan.task
    named: dict[str, Any] = {"env": task.environment, "preset": task.preset, "minutes": plan.minutes, "seed": plan.seed}
    named |= {"run": folder, "threads": plan.threads, "device": plan.device, **task.options}
    if plan.steps is not None:
        named["steps"] = plan.steps
    if task.checkpoint_minutes is not None:
        named["save-minutes"] = task.checkpoint_minutes
    options = _options(named)
    options += ["--env-args", *task.env_args] if task.env_args else []
    return [*options, *_options(task.variants[plan.variant]), *plan.extra]


def _options(values: Mapping[str, Any]) -> list[str]:
    """NAME -> value, None for a flag."""
    return [text for name, value in values.items() for text in (f"--{name}", *([] if value is None else [str(value)]))]


def execute(plan: Plan, folder: Path) -> dict[str, Any]:
    """Trains in a process and evaluates; RuntimeError if training fails."""
    command = [sys.executable, "-m", "worldmodel", "train", *train_options(plan, folder)]
    start, before = time.perf_counter(), os.times()
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while training.poll() is None:
            keep_checkpoints(folder)
            time.sleep(1)
    finally:
        training.kill()
    if training.returncode:
        raise RuntimeError(f"{plan.key}: training ended with exit status {training.returncode}")
    wall, after = time.perf_counter() - start, os.times()
    keep_checkpoints(folder)
    torch.set_num_threads(plan.threads)
    run, task = Run(folder), plan.task
    best = run.best is not None and not task.checkpoint_minutes
    agent = Agent.load(folder, plan.device, best=best)
    arguments = saved_config(run).env_args
    found = evaluate(agent, task.environment, plan.episodes, 10**6, num_envs=50, env_args=arguments)
    lines = run.metrics
    last = lines[-1]
    return {
        "task": plan.task.name,
        "variant": plan.variant,
        "seed": plan.seed,
        "minutes": plan.minutes,
        "seconds": last["seconds"],
        "steps": last["steps"],
        "updates": last["updates"],
        "parameters": sum(p.numel() for p in agent.world_model.parameters()),
        "evaluation": found.to_json(),
        "best": run.best_evaluation if best else None,
        "share_right": share_right(lines, task.last) if task.score == "share right" else None,
        "evaluations": evaluations(plan, folder) if task.checkpoint_minutes else own_evaluations(lines),
        "milliseconds_per_update": update_times(lines),
        "curve": [
            [line["seconds"], line["steps"], line["episode/return"]] for line in lines if "episode/return" in line
        ],
        # On a busy machine a run gets fewer cores.
        "cores_used": (after.children_user + after.children_system - before.children_user - before.children_system)
        / wall,
        "settings": run.config["train"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.describe(torch.device(plan.device))["wmkernels"]["commit"],
    }


def keep_checkpoints(folder: Path) -> None:
    """Copies new acting weights: a run keeps only two checkpoints."""
    for checkpoint in (folder / "checkpoints").glob("*"):
        kept = folder / "passed" / checkpoint.name
        if not checkpoint.name.isdigit() or kept.exists():
            continue
        beside = kept.with_name(kept.name + ".partial")
        name = acting_part(saved_config(Run(folder))) + ".safetensors"
        weights = beside / "checkpoints" / checkpoint.name / name
        weights.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "config.json", beside / "config.json")
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            shutil.copyfile(checkpoint / weights.name, weights)
            beside.rename(kept)


def evaluations(plan: Plan, folder: Path) -> list[list[float]]:
    """Seconds, steps and greedy mean return per checkpoint, on other episodes than the final evaluation."""
    lines = Run(folder).metrics
    found = []
    for kept in sorted(path for path in (folder / "passed").iterdir() if path.name.isdigit()):
        steps = int(kept.name)
        seconds = next((line["seconds"] for line in lines if line["steps"] >= steps), lines[-1]["seconds"])
        agent = Agent.load(kept, plan.device)
        returned = evaluate(agent, plan.task.environment, PASSING_EPISODES, 2 * 10**6, num_envs=PASSING_EPISODES)
        found.append([seconds, steps, returned.mean])
    return found


def own_evaluations(lines: list[dict[str, float]]) -> list[list[float]]:
    """Seconds, steps and mean return of training's own evaluations."""
    return [[line["seconds"], line["steps"], line["eval/return"]] for line in lines if "eval/return" in line]


def share_right(lines: list[dict[str, float]], last: int) -> dict[str, float]:
    """Of the last episodes of training, at least ``last``, the share with return 1 where the others have -1."""
    counted, total, later = 0.0, 0.0, None
    for line in reversed([line for line in lines if "episodes" in line]):
        if later is not None and (new := later["episodes"] - line["episodes"]) > 0:
            counted, total = counted + new, total + new * later["episode/return"]
        if counted >= last:
            break
        later = line
    return {"episodes": counted, "share": (1 + total / counted) / 2 if counted else float("nan")}


def update_times(lines: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds per update of collecting, observing and imagining, with backward passes; the fraction of imagining.

    Collecting counts the steps per update, so it depends on the train ratio.
    """
    learning = [line for line in lines if "seconds/imagine" in line]
    if len(learning) < 2:
        return {}
    weights = [line["updates"] - earlier["updates"] for earlier, line in itertools.pairwise(learning)]
    steps = [line["steps"] - earlier["steps"] for earlier, line in itertools.pairwise(learning)]

    def mean(name: str, over: list[float]) -> float:
        values = [line[name] for line in learning[1:]]
        return math.fsum(v * w for v, w in zip(values, over, strict=True)) / math.fsum(over)

    total = 1e3 * mean("seconds/update", weights)
    observe, imagine = 1e3 * mean("seconds/observe", weights), 1e3 * mean("seconds/imagine", weights)
    # Logged per vector step.
    vector_steps = math.fsum(steps) / learning[-1]["environments"]
    collect = mean("milliseconds/collect", [float(s) for s in steps]) * vector_steps / math.fsum(weights)
    return {
        "collect": collect,
        "observe": observe,
        "imagine": imagine,
        "update": total,
        "imagine_fraction": imagine / (collect + total),
    }

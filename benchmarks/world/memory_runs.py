import dataclasses
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import environment
from world import cue, inputs, moving
from worldmodel.acting.agent import Agent
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.run import Run

HELD_OUT = 10**6
"""First held-out seed; training draws from 2**31 others."""


def _measure_cue(world_model: WorldModel, env: str, episodes: int) -> dict[str, Any]:
    trajectories = cue.random_trajectories(env, episodes, HELD_OUT)
    return {
        "gaps": cue.accuracy_by_gap(trajectories, cue.of_model(world_model)),
        "by_input": inputs.losses(world_model, inputs.batch_of(world_model, trajectories[:50])),
    }


def _measure_ball(world_model: WorldModel, env: str, episodes: int) -> dict[str, Any]:
    return {"wrong_cells": moving.errors(world_model, *moving.random_episodes(env, episodes, HELD_OUT))}


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment and its held-out measure.

    Attributes:
        steps: collected per run.
        episodes: held out.
        memories: name -> options of ``python -m worldmodel train``.
        measure: (world model, env, episodes) -> JSON entry.
    """

    env: str
    preset: str
    steps: int
    episodes: int
    memories: dict[str, tuple[str, ...]]
    measure: Callable[[WorldModel, str, int], dict[str, Any]]


SAMPLED = ("--model.perception.latent.stochastic",)
TASKS = {
    "cue": Task(
        "worldmodel/MemoryS9-v0",
        "wander",
        300_000,
        200,
        {
            "scan": (),
            "none": ("--memory", "none"),
            "scan (latent sampled)": SAMPLED,
            "scan (latent sampled for half of memory)": (*SAMPLED, "--learner.objective.sampled", "0.5"),
            "scan (latent sampled for memory)": (*SAMPLED, "--learner.objective.sampled", "1"),
            "none (latent sampled)": (*SAMPLED, "--memory", "none"),
        },
        _measure_cue,
    ),
    "ball": Task(
        "worldmodel/HiddenBall-v0",
        "moving",
        100_000,
        200,
        {
            "ConvLSTM": (),
            "scan": ("--memory", "rotary_scan"),
            "none": ("--memory", "none"),
        },
        _measure_ball,
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One task, memory and seed.

    Attributes:
        task: one of ``TASKS``.
        memory: one of the task's.
        steps: collected; None: the task's.
        episodes: held out; None: the task's.
        extra: options of ``python -m worldmodel train``.
    """

    task: str
    memory: str
    seed: int
    steps: int | None = None
    episodes: int | None = None
    threads: int = 1
    extra: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.task}/{self.memory}/{self.seed}"


def train_options(plan: Plan, folder: Path) -> list[str]:
    task = TASKS[plan.task]
    named = {"env": task.env, "preset": task.preset, "steps": plan.steps or task.steps, "seed": plan.seed}
    named |= {"run": folder, "threads": plan.threads}
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return [*options, *task.memories[plan.memory], *plan.extra]


def execute(plan: Plan, folder: Path) -> dict[str, Any]:
    """Trains in a process and evaluates; RuntimeError if training fails."""
    task = TASKS[plan.task]
    command = [sys.executable, "-m", "worldmodel", "train", *train_options(plan, folder)]
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{plan.key}: training ended with exit status {done.returncode}")
    wall, after = time.perf_counter() - start, os.times()
    torch.set_num_threads(plan.threads)
    world_model = Agent.load(folder).world_model
    last = Run(folder).metrics[-1]
    return {
        "task": plan.task,
        "memory": plan.memory,
        "seed": plan.seed,
        "steps": last["steps"],
        "updates": last["updates"],
        "seconds": wall,
        # Not wall time, which depends on other processes.
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "parameters": sum(p.numel() for p in world_model.memory.parameters()),
        "measured": task.measure(world_model, task.env, plan.episodes or task.episodes),
        "settings": Run(folder).config["train"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.describe(torch.device("cpu"))["wmkernels"]["commit"],
    }

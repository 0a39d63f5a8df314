"""Memories in the game of channels, a league of jammers, networks that detect and recover, the time of 1,024 intervals.

    python benchmarks/radar.py agents --memories attention --jammers 8 1-8 --seeds 5 6 7
    python benchmarks/radar.py league --seeds 5
    python benchmarks/radar.py detection --seeds 5 6 7
    python benchmarks/radar.py memory --seeds 5 6 7
    python benchmarks/radar.py recovery --seeds 5 6 7
    python benchmarks/radar.py agents --memories "attention, sampled chain" --jammers 1-8
    python benchmarks/radar.py world_model --seeds 5 --look-backs 1 4 --minutes 5
    python benchmarks/radar.py time
    python benchmarks/radar.py report                      # the tables

Rows are merged into one JSON file. Minutes are CPU time of one thread. Hits are the share of intervals in which the
jammer was in the radar's channel, after the first ones that the longest look-back and 8 more take. What ``detection``,
``memory`` and ``recovery`` measure is in ``radar_networks.py``.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import radar_networks
from harness import tables
from harness.keyed_rows import KeyedRows
from worldmodel.environments.radar.config import RadarConfig
from worldmodel.environments.radar.game import RadarGameConfig, RadarGames
from worldmodel.environments.radar.interval import Jamming, sample_interval
from worldmodel.environments.radar.policies import baselines, score
from worldmodel.environments.radar.theory import power
from worldmodel.learning.channel_agent import ChannelAgentConfig, RadarPlayer, memories
from worldmodel.learning.channel_league import League, LeagueConfig, best_response, hits
from worldmodel.learning.channel_trainer import ChannelTrainConfig, RadarTrainer

RESULT = Path(__file__).resolve().parent / "results" / "radar_cpu.json"
SECTIONS = ("agents", "baselines", "league", "detection", "memory", "recovery", "world_model")
SAMPLED = ", sampled chain"  # after a memory: it learned from samples of the chain, not from its exact expectation
MEMORIES = tuple(name + how for how in ("", SAMPLED) for name in memories(1))
SAMPLED_TIME = 4  # times the seconds, as each sample is simulated
BASELINES = ("fixed", "round robin", "random", "memoryless", "oracle")


@dataclasses.dataclass(frozen=True)
class Jammer:
    """A look-back jammer of hidden L, and the training against it.

    Attributes:
        longest: L.
        shortest: L.
        steps: of a game in training, after as many as the longest look-back.
        batch: games at once.
        seconds: of training, CPU time.
        targets: hits, at most: at least, aim.
    """

    shortest: int
    longest: int
    steps: int
    batch: int
    seconds: float
    targets: tuple[float | None, float]

    @property
    def look_back(self) -> tuple[int, int]:
        return self.shortest, self.longest


JAMMERS = {
    "8": Jammer(8, 8, 40, 32, 60, (0.005, 0.0)),
    "1-8": Jammer(1, 8, 40, 32, 25, (0.02, 0.005)),
    "1-16": Jammer(1, 16, 40, 32, 30, (0.05, 0.01)),
    "1-64": Jammer(1, 64, 40, 32, 60, (None, 0.03)),
}
UNSEEN = 4  # intervals of L beyond the longest of the training, at most
FEWER = 6  # channels, of 8
GAMES, STEPS, SEED = 256, 64, 1000


class FewerChannels(RadarPlayer):
    """Plays games of fewer channels as though the others were never free."""

    def __init__(self, player: RadarPlayer, channels: int) -> None:
        super().__init__(player.agent, player.greedy)
        self.channels = channels

    def inputs(self, games: RadarGames) -> Tensor:
        few = games.config.channels
        parts = super().inputs(games).split([few, games.config.waveforms + 2, few, few], 1)
        return torch.cat([F.pad(part, (0, self.channels - few)) if i != 1 else part for i, part in enumerate(parts)], 1)

    def legal(self, games: RadarGames) -> Tensor:
        return F.pad(super().legal(games), (0, self.channels - games.config.channels))


def agent_row(name: str, jammer_name: str, seed: int, seconds: float | None) -> dict[str, Any]:
    jammer, sampled = JAMMERS[jammer_name], name.endswith(SAMPLED)
    if seconds is None:
        seconds = jammer.seconds * (SAMPLED_TIME if sampled else 1)
    game = RadarGameConfig(look_back=jammer.look_back)
    config = ChannelTrainConfig(
        agent=ChannelAgentConfig(memories(jammer.longest)[name.removesuffix(SAMPLED)]),
        batch_size=jammer.batch,
        steps=jammer.steps,
        lr=4e-3,
        minutes=seconds / 60,
        clock="cpu",
        seed=seed,
    )
    trainer = RadarTrainer(dataclasses.replace(game, sampled=sampled), config)
    while not trainer.finished:
        trainer.iterate()
    player = RadarPlayer(trainer.agent)

    def scored(config: RadarGameConfig, steps: int, games: int = GAMES, own: RadarPlayer = player) -> dict[str, float]:
        return score(config, {"agent": own}, steps, games, SEED)["agent"]

    beyond = RadarGameConfig(look_back=(jammer.longest + 1, jammer.longest + UNSEEN))
    fewer = RadarGameConfig(channels=FEWER, look_back=jammer.look_back)
    return {
        "section": "agents",
        "memory": name,
        "jammer": jammer_name,
        "seed": seed,
        "seconds": seconds,
        "updates": trainer.learner.updates,
        "parameters": sum(parameter.numel() for parameter in trainer.agent.parameters()),
        **scored(game, STEPS),
        "long": scored(game, 10 * (jammer.longest + jammer.steps), GAMES // 4)["hits"],
        "unseen_look_back": scored(beyond, STEPS)["hits"],
        "fewer_channels": scored(fewer, STEPS, own=FewerChannels(player, game.channels))["hits"],
    }


def baseline_rows(jammer_name: str) -> list[dict[str, Any]]:
    game = RadarGameConfig(look_back=JAMMERS[jammer_name].look_back)
    found = score(game, baselines(game), STEPS, GAMES, SEED)
    about = {"section": "agents", "jammer": jammer_name, "seed": SEED}
    return [{**about, "memory": name, **row} for name, row in found.items()]


def league_row(past: float, seed: int, rounds: int, turn: int) -> dict[str, Any]:
    """A league with or without a pool, and what jammers reach against its radar."""
    game = RadarGameConfig(look_back=(1, 2))
    agent = ChannelAgentConfig(memories(2)["GRU"], hidden=64)
    train = ChannelTrainConfig(agent, batch_size=32, steps=24, warmup=20, entropy=0.05, seed=seed)
    began = time.process_time()
    league = League(game, LeagueConfig(train, turn=turn, past=past))
    for _ in range(rounds):
        league.round()
    trained = time.process_time() - began
    fresh = best_response(league.radar, game, dataclasses.replace(train, seed=seed + 100), 3 * turn)
    own, *past_hits = hits(league.radar, league.pool, game, STEPS, GAMES, SEED)
    return {
        "section": "league",
        "past": past,
        "seed": seed,
        "rounds": rounds,
        "turn": turn,
        "seconds": trained,
        "fresh": hits(league.radar, [fresh], game, STEPS, GAMES, SEED)[0],
        "look_back": own,
        "newest": past_hits[-1],
        "past_mean": statistics.fmean(past_hits),
        "past_worst": max(past_hits),
    }


def time_row(repeats: int = 9) -> dict[str, Any]:
    """1,024 intervals of 8 pulses × 64 cells with smeared copies, forward and backward to pulse and power."""
    radar = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=8)
    game = RadarGameConfig(radar=radar)
    pulse = game.pulses()[0].requires_grad_()
    snr = torch.full((1024,), power(16.0)).requires_grad_()
    ratio = torch.full((1024,), power(10.0))
    times = []
    for seed in range(repeats):
        began, wall = time.process_time(), time.perf_counter()
        jamming = Jamming(torch.zeros(1024), pulse, ratio, game.smear)
        interval = sample_interval(radar, pulse, snr, jamming, generator=torch.Generator().manual_seed(seed))
        interval.score(game.cfar).mean().backward()
        times.append((time.process_time() - began, time.perf_counter() - wall))
    cpu, elapsed = zip(*times, strict=True)
    return {
        "section": "time",
        "cpu_median": statistics.median(cpu),
        "cpu_best": min(cpu),
        "wall_best": min(elapsed),
        "map_time": radar_networks.map_time(),
    }


def world_model_row(seed: int, minutes: float, look_back: int = 1) -> dict[str, Any]:
    """``python -m worldmodel train`` against a jammer of known L, and its greedy policy's mean return."""
    game = RadarGameConfig(look_back=(look_back, look_back))
    program = [sys.executable, "-m", "worldmodel"]
    with tempfile.TemporaryDirectory() as folder:
        run, told = Path(folder) / "run", Path(folder) / "told.json"
        given = ["--env", "worldmodel/RadarGame-v0", "--env-args", f"look_back=[{look_back},{look_back}]"]
        given += ["--preset", "popgym", "--minutes", str(minutes), "--clock", "cpu"]
        given += ["--threads", "1", "--seed", str(seed)]
        began = os.times().children_user
        subprocess.run([*program, "train", *given, "--run", str(run)], check=True)
        seconds = os.times().children_user - began
        given = ["--episodes", "64", "--random-episodes", "64", "--seed", str(SEED), "--threads", "1"]
        subprocess.run([*program, "evaluate", str(run), *given, "--json", str(told)], check=True)
        found = json.loads(told.read_text())
    intervals = found["lengths"][0]
    rewards = {name: one["detections"] for name, one in score(game, baselines(game), intervals, GAMES, SEED).items()}
    return {
        "section": "world model",
        "jammer": str(look_back),
        "seed": seed,
        "minutes": minutes,
        "seconds": seconds,
        "episodes": found["episodes"],
        "intervals": intervals,
        "return": found["mean"],
        "interval": found["interval"],
        "random": found["random"]["mean"],
        "random_interval": found["random"]["interval"],
        "baselines": {name: intervals * reward for name, reward in rewards.items()},
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("section", "memory", "jammer", "past", "snr", "seed"))


def percent(values: list[float]) -> str:
    """The mean, and each where there are several."""
    mean = f"{statistics.fmean(values):.2%}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:.2%}' for value in values)})"


def agent_table(rows: list[dict[str, Any]]) -> str:
    further = {"long": "ten times as long", "unseen_look_back": f"L up to {UNSEEN} longer"}
    further |= {"fewer_channels": f"{FEWER} channels"}
    cells = []
    for jammer in JAMMERS:
        for name in (*BASELINES, *MEMORIES):
            found = [row for row in rows if (row.get("memory"), row.get("jammer")) == (name, jammer)]
            if not found:
                continue
            trained = "updates" in found[0]
            cells.append(
                [
                    jammer,
                    name,
                    f"{found[0]['seconds']:g}" if trained else "",
                    percent([row["hits"] for row in found]),
                    f"{statistics.fmean(row['detections'] for row in found):.1%}",
                    *(percent([statistics.fmean(row[x] for row in found)]) if trained else "" for x in further),
                ]
            )
    return tables.markdown(["L", "policy", "CPU s", "hits", "detections", *further.values()], cells)


def target_table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for name, jammer in JAMMERS.items():
        found = [row["hits"] for row in rows if (row.get("memory"), row.get("jammer")) == ("attention", name)]
        if not found:
            continue
        mean, (least, aim) = statistics.fmean(found), jammer.targets
        verdict = tables.outcome(-mean, None if least is None else -least, -aim)
        cells.append([name, "" if least is None else f"{least:.1%}", f"{aim:.1%}", f"{mean:.2%}", verdict])
    return tables.markdown(["L", "hits, at most", "aim", "attention", ""], cells)


def league_table(rows: list[dict[str, Any]]) -> str:
    names = {"fresh": "a fresh jammer", "newest": "the newest", "past_mean": "past ones, mean"}
    names |= {"past_worst": "past ones, worst", "look_back": "look-back"}
    cells = []
    for past in sorted({row["past"] for row in rows if row["section"] == "league"}, reverse=True):
        found = [row for row in rows if row["section"] == "league" and row["past"] == past]
        label = f"with the pool, {past:.0%} of the games" if past else "without"
        cells.append([label, str(len(found)), *(percent([statistics.fmean(row[x] for row in found)]) for x in names)])
    return tables.markdown(["radar", "seeds", *names.values()], cells)


def world_model_table(rows: list[dict[str, Any]]) -> str:
    """Return per game of the world model's policy, of each seed, and of the baselines."""
    cells = []
    found = [row for row in rows if row["section"] == "world model"]
    for jammer in sorted({row["jammer"] for row in found}, key=int):
        same = [row for row in found if row["jammer"] == jammer]
        intervals = same[0]["intervals"]
        minutes = statistics.fmean(row["seconds"] for row in same) / 60
        returns = [row["return"] for row in same]
        trained = f"{statistics.fmean(returns):.2f} ({', '.join(f'{value:.2f}' for value in returns)})"
        listed = [(f"world model, {minutes:.1f} CPU minutes", trained, statistics.fmean(returns))]
        means = {"random actions": statistics.fmean(row["random"] for row in same), **same[0]["baselines"]}
        listed += [(name, f"{mean:.2f}", mean) for name, mean in means.items()]
        cells += [[jammer, name, shown, f"{mean / intervals:.1%}"] for name, shown, mean in listed]
    return tables.markdown(["L", "policy", "return", "detections"], cells)


def time_line(rows: list[dict[str, Any]]) -> str:
    found = [row for row in rows if row["section"] == "time"]
    if not found:
        return ""
    row = found[0]
    line = (
        f"1,024 intervals of 8 pulses × 64 cells, forward and backward: {tables.figure(row['cpu_best'])} s of CPU time "
        f"at best, {tables.figure(row['cpu_median'])} s in the median, one thread on a busy machine."
    )
    if "map_time" in row:
        line += (
            f" The detection network with a memory, over 128 tracks of 8 such intervals: "
            f"{tables.figure(row['map_time'])} s at best."
        )
    return line


def report(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Markdown by section."""
    return {
        "targets": target_table(rows),
        "agents": agent_table(rows),
        "league": league_table(rows),
        "detection": radar_networks.detection_table(rows),
        "memory": radar_networks.memory_table(rows),
        "pulses": radar_networks.pulse_table(rows),
        "recovery": radar_networks.recovery_table(rows),
        "world model": world_model_table(rows),
        "time": time_line(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "time", "report"])
    parser.add_argument("--memories", nargs="+", default=["attention"], choices=MEMORIES)
    parser.add_argument("--jammers", nargs="+", default=list(JAMMERS), choices=list(JAMMERS), help="L")
    parser.add_argument("--seeds", nargs="+", type=int, default=[5, 6, 7])
    parser.add_argument("--seconds", type=float, help="of CPU time, instead of each jammer's own")
    parser.add_argument("--look-backs", nargs="+", type=int, default=[1], help="L of world models")
    parser.add_argument("--minutes", type=float, default=5, help="of a world model's training, CPU time")
    parser.add_argument("--rounds", type=int, default=6, help="of a league")
    parser.add_argument("--turn", type=int, default=30, help="updates of a side of a league, before the other's turn")
    parser.add_argument("--json", type=Path, default=RESULT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    saved = KeyedRows(chosen.json, "radar", key)
    if chosen.section == "agents":
        for seed in chosen.seeds:
            for jammer in chosen.jammers:
                for name in chosen.memories:
                    saved.add(agent_row(name, jammer, seed, chosen.seconds))
    elif chosen.section == "baselines":
        for jammer in chosen.jammers:
            for row in baseline_rows(jammer):
                saved.add(row)
    elif chosen.section == "league":
        for seed in chosen.seeds:
            for past in (0.5, 0.0):
                saved.add(league_row(past, seed, chosen.rounds, chosen.turn))
    elif chosen.section == "detection":
        for seed in chosen.seeds:
            for row in radar_networks.detection_rows(seed, chosen.seconds):
                saved.add(row)
    elif chosen.section == "memory":
        for seed in chosen.seeds:
            for row in radar_networks.memory_rows(seed, chosen.seconds):
                saved.add(row)
    elif chosen.section == "recovery":
        for seed in chosen.seeds:
            for row in radar_networks.recovery_rows(seed, chosen.seconds):
                saved.add(row)
    elif chosen.section == "world_model":
        for seed in chosen.seeds:
            for look_back in chosen.look_backs:
                saved.add(world_model_row(seed, chosen.minutes, look_back))
    elif chosen.section == "time":
        saved.add(time_row())
    for title, text in report(saved.rows).items():
        print(f"\n{title}\n{text}")


if __name__ == "__main__":
    main()

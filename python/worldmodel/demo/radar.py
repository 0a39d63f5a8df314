"""``demo radar``: agents learn to hop away from a jammer, a pulse gets low sidelobes, and both are drawn."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.demo.radar_picture import Drawn, draw
from worldmodel.environments.radar.config import Decibels
from worldmodel.environments.radar.design import DesignConfig, design, measured
from worldmodel.environments.radar.echoes import normal
from worldmodel.environments.radar.game import Policy, RadarGameConfig, RadarGames
from worldmodel.environments.radar.interval import Interval, Jamming, sample_interval
from worldmodel.environments.radar.jamming import smear
from worldmodel.environments.radar.policies import random
from worldmodel.environments.radar.quality import ambiguity
from worldmodel.environments.radar.theory import power
from worldmodel.environments.radar.waveforms import LFM
from worldmodel.learning.channel_agent import ChannelAgentConfig, RadarPlayer, memories
from worldmodel.learning.channel_trainer import ChannelTrainConfig, RadarTrainer
from worldmodel.learning.threads import threads_restored
from worldmodel.runs.fields import Checked, Limit, Positive, Seed, check_writable

GAME = RadarGameConfig(look_back=(1, 8))
NAMES = ("attention", "GRU", "no memory")
WINDOW = 16  # samples per spectrum
_SHOWN, _INTERVALS, _GAMES = 28, 48, 256  # intervals drawn and counted, games
_PULSE: Decibels = 20.0  # power of the radar's own pulse in the spectrogram
_DOPPLERS = 65


@dataclasses.dataclass
class RadarDemoOptions(Checked):
    """Trains three memories in a game of channels, designs a pulse, and draws one picture."""

    folder: Path = Path("demo-radar")
    """Folder for results and the picture."""
    seconds: Positive = 40
    """Seconds of training per memory."""
    design_steps: Limit = 400
    """Steps in which the pulse is designed."""
    seed: Seed = 0
    """Seed of weights, games and the pulse."""


@threads_restored()
def run_radar(options: RadarDemoOptions) -> Path:
    """Returns the picture's path; raises ConfigurationError for the folder."""
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), options.folder
    check_writable("--folder", folder / "radar.json", parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    policies: dict[str, Policy] = {name: _trained(name, options) for name in NAMES} | {"random": random}
    hits = {name: hits_by_interval(policy, options.seed) for name, policy in policies.items()}
    settled = {name: float(np.mean(found[2 * GAME.look_back[1] :])) for name, found in hits.items()}
    for name, share in settled.items():
        _say(f"{name}: hit in {share:.1%} of the intervals from {2 * GAME.look_back[1]} on")
    config = DesignConfig(steps=options.design_steps, seed=options.seed)
    before = measured(LFM(config.time_bandwidth * config.oversampling, 1 / config.oversampling)().detach(), config)
    after = design(config)
    _say(f"peak sidelobe of the pulse: {before.peak_sidelobe:.1f} dB before, {after.peak_sidelobe:.1f} dB after")
    sent, jammed = one_game(policies[NAMES[0]], options.seed)
    shift = torch.linspace(-4, 4, _DOPPLERS) / before.waveform.shape[-1]  # turns per sample: ± 4 / duration
    maps = {name: range_doppler(name == "hit", options.seed) for name in ("clear", "hit")}
    drawn = Drawn(
        spectrogram=spectrogram(sent, jammed, options.seed).numpy(),
        channels=GAME.channels,
        sent=sent.numpy(),
        jammed=jammed.numpy(),
        hits=hits,
        maps={f"an interval, {name}": 10 * found.powers[0].log10().numpy() for name, found in maps.items()},
        target=(int(maps["hit"].row), int(maps["hit"].cell)),
        pulses={f"LFM: {before.peak_sidelobe:.1f} dB": ambiguity(before.waveform, shift).numpy()}
        | {f"designed: {after.peak_sidelobe:.1f} dB": ambiguity(after.waveform, shift).numpy()},
    )
    picture = folder / "radar.png"
    draw(drawn, picture)
    summary: dict[str, Any] = {
        "hits": settled,
        "hits_by_interval": hits,
        "peak_sidelobe": {"before": before.peak_sidelobe, "after": after.peak_sidelobe},
        "main_lobe": after.main_lobe,
        "energy_in_band": after.inside,
        "seconds": time.perf_counter() - start,
    }
    (folder / "radar.json").write_text(json.dumps(summary, indent=1) + "\n")
    _say(f"{summary['seconds']:.0f} s in all")
    return picture


def _trained(name: str, options: RadarDemoOptions) -> RadarPlayer:
    agent = ChannelAgentConfig(memories(GAME.look_back[1])[name])
    trainer = RadarTrainer(GAME, ChannelTrainConfig(agent, minutes=options.seconds / 60, seed=options.seed))
    while not trainer.finished:
        metrics = trainer.iterate()
    accuracy = metrics["prediction_accuracy"]
    _say(f"{name}: {trainer.learner.updates:,} updates, {accuracy:.0%} of the jammer's channels predicted")
    return RadarPlayer(trainer.agent)


def hits_by_interval(policy: Policy, seed: int) -> list[float]:
    """Share of games in which the radar was hit, by interval; L is another in each game."""
    games = RadarGames(_GAMES, GAME, torch.Generator().manual_seed(seed))
    found: list[float] = games.rollout(_INTERVALS, policy)["hit"].double().mean(0).tolist()
    return found


def one_game(policy: Policy, seed: int) -> tuple[Tensor, Tensor]:
    """Channels of radar and jammer in a game with the longest look-back, int64 (intervals,)."""
    longest = GAME.look_back[1]
    games = RadarGames(1, dataclasses.replace(GAME, look_back=(longest, longest)), torch.Generator().manual_seed(seed))
    played = games.rollout(_SHOWN, policy)
    return played["actions"][0] // GAME.waveforms, played["jammed"][0]


def spectrogram(sent: Tensor, jammed: Tensor, seed: int) -> Tensor:
    """Power in dB over the noise that a receiver of all channels hears in the first pulse of each interval.

    Args:
        sent: channel of the radar, int64 (intervals,).
        jammed: channel of the jammer, int64 (intervals,).
        seed: of the noise.

    Returns:
        (channels × ``WINDOW`` frequencies, intervals × windows of a pulse's repetition).
    """
    generator, radar, pulse = torch.Generator().manual_seed(seed), GAME.radar, GAME.pulses()[0]
    count = len(sent)
    ratio = torch.full((count,), power(GAME.jnr))
    copies = smear(radar, pulse, ratio, torch.zeros(count), GAME.smear, generator)[:, 0]  # (intervals, cells)
    signal = normal((count, GAME.channels, radar.cells), generator, ratio)
    interval = torch.arange(count)
    signal[interval, sent, : radar.samples] += math.sqrt(power(_PULSE)) * pulse
    signal[interval, jammed] += copies
    spectra = torch.fft.fft(signal.unflatten(-1, (-1, WINDOW)), norm="ortho").abs().square()
    spectra = torch.fft.fftshift(spectra, -1)  # (intervals, channels, windows, frequencies)
    return 10 * spectra.permute(1, 3, 0, 2).flatten(2).flatten(0, 1).log10()


def range_doppler(hit: bool, seed: int) -> Interval:
    """A map in which the radar was hit by a copy, or not; the target is in the same cell of both."""
    ratio = torch.full((1,), power(GAME.jnr) if hit else 0.0)
    jamming = Jamming(torch.zeros(1), GAME.pulses()[0], ratio, GAME.smear)
    snr = torch.full((1,), power(GAME.snr))
    generator = torch.Generator().manual_seed(seed)
    return sample_interval(GAME.radar, GAME.pulses()[0], snr, jamming, swerling=0, generator=generator)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

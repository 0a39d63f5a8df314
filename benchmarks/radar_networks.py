"""Rows and tables of ``radar.py``: detection networks under jamming, learned pulses, a jammer's recovery of pulses."""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from harness import tables
from worldmodel.environments.radar.config import CFARConfig
from worldmodel.environments.radar.quality import correlation, peak_sidelobe
from worldmodel.learning.detection_game import (
    DetectionTrainConfig,
    DetectionTrainer,
    Jam,
    SceneConfig,
    best_response,
    cfar_scores,
    known_jammers,
    learned,
    measure,
)
from worldmodel.learning.detection_networks import TrackingConfig, TrackingNetwork
from worldmodel.learning.pulse_recovery import FAMILIES, RecoveryConfig, RecoveryTrainer, similarities
from worldmodel.learning.track_detection import (
    TrackConfig,
    TrackTrainer,
    each_alone,
    measure_tracks,
    remembering,
    sample_tracks,
    summed,
    summed_cfar,
)

SCENE = SceneConfig()
SECONDS, PULSE_SECONDS, RECOVERY_SECONDS = 60, 15, 30  # of training, CPU time
MAPS, SEED, CODES, FRESH = 3072, 1000, 4, 100
DETECTORS = {"cfar": "CA-CFAR", "adaptive_cfar": "CA-CFAR, flat spectrum", "network": "network"}
TRAINED, PAST, UNTRAINED = "learned with the network", "learned, past", "learned afresh"
TRACKS = TrackConfig()
MEMORY_SECONDS, TRACK_COUNT, SHOWN = 90, 1024, (1, 2, 4, 8)
TRACKERS = {
    "cfar": "CA-CFAR, each interval alone",
    "integrated": "powers summed along the track, then CA-CFAR",
    "odds": "network, log odds summed along the track",
    "staying": "network with memory, frame that stays",
    "following": "network with memory, frame that follows",
}
NONE, PRESENT = "none", "copies of the present pulse"
GOAL, AIM = 0.1, 0.2
RATIOS = (-5.0, 0.0, 5.0, 10.0)  # dB per sample


def detection_rows(seed: int, seconds: float | None) -> Iterator[dict[str, Any]]:
    """A row per kind of jammer, and rows of pulses that learn."""
    seconds = SECONDS if seconds is None else seconds
    config = DetectionTrainConfig(minutes=seconds / 60, clock="cpu", seed=seed)
    trainer = DetectionTrainer(SCENE, config)
    while not trainer.finished:
        trainer.iterate()
    radar = SCENE.radar
    fresh = best_response(trainer.detector, SCENE, dataclasses.replace(config, seed=seed + 100), FRESH)
    known = known_jammers(radar)
    jammers: dict[str, Jam | None] = {
        TRAINED: learned(trainer.jammer, radar),
        PAST: learned(trainer.pool[len(trainer.pool) // 2] or trainer.jammer, radar),
        UNTRAINED: learned(fresh, radar),
        **known,
        NONE: None,
        PRESENT: known["copies"],
    }
    detectors = _detectors(trainer)
    limits = None
    for name, jam in jammers.items():
        scene = dataclasses.replace(SCENE, agile=name != PRESENT)
        found = measure(detectors, scene, jam, MAPS, SEED, limits=limits)
        limits = limits or {detector: one.limit for detector, one in found.items()}
        yield {
            "section": "detection",
            "jammer": name,
            "seed": seed,
            "seconds": seconds,
            "updates": trainer.updates,
            "maps": MAPS,
            **{detector: one.detection for detector, one in found.items()},
            "false_alarms": {detector: one.alarms for detector, one in found.items()},
        }
    yield from pulse_rows(trainer, seed)


def pulse_rows(before: DetectionTrainer, seed: int) -> Iterator[dict[str, Any]]:
    """Random codes, and the same after they learned, against the detector and jammer that learned with them."""
    config = dataclasses.replace(before.config, minutes=PULSE_SECONDS / 60)
    generator = torch.Generator().manual_seed(seed)
    first = 2 * math.pi * torch.rand(CODES, SCENE.radar.samples, generator=generator)
    trainer = DetectionTrainer(SCENE, config, nn.Parameter(first.clone()))
    for network in ("detector", "jammer"):
        getattr(trainer, network).load_state_dict(copy.deepcopy(getattr(before, network).state_dict()))
    while not trainer.finished:
        trainer.iterate()
    assert trainer.phases is not None
    jammers = {TRAINED: learned(trainer.jammer, SCENE.radar), "barrage": known_jammers(SCENE.radar)["barrage"]}
    for stage, phases in {"random": first, "learned": trainer.phases.detach()}.items():
        pulses = torch.polar(torch.ones_like(phases), phases)
        for name, jam in jammers.items():
            found = measure(_detectors(trainer), SCENE, jam, MAPS, SEED, pulses=pulses)
            yield {
                "section": "pulses",
                "memory": stage,
                "jammer": name,
                "seed": seed,
                "seconds": PULSE_SECONDS,
                "updates": trainer.updates,
                "maps": MAPS,
                **{detector: one.detection for detector, one in found.items()},
                "peak_sidelobe": statistics.fmean(peak_sidelobe(correlation(pulse)) for pulse in pulses),
            }


def memory_rows(seed: int, seconds: float | None) -> Iterator[dict[str, Any]]:
    """A row per kind of jammer: share of targets found in each interval of tracks, by each detector."""
    seconds = MEMORY_SECONDS if seconds is None else seconds
    radar, moved = TRACKS.radar, TRACKS.moved
    alone = DetectionTrainer(TRACKS, DetectionTrainConfig(minutes=seconds / 60, clock="cpu", seed=seed))
    trainers = {"alone": alone}
    for name, following in {"following": True, "staying": False}.items():
        config = DetectionTrainConfig(
            TrackingConfig(following=following), batch_size=8, minutes=seconds / 60, clock="cpu", seed=seed
        )
        trainers[name] = TrackTrainer(TRACKS, config)
    for trainer in trainers.values():
        while not trainer.finished:
            trainer.iterate()
    cfar = cfar_scores(radar, CFARConfig())
    detectors = {
        "cfar": each_alone(cfar),
        "integrated": summed_cfar(radar, CFARConfig(), moved),
        "odds": summed(alone.detector, moved),
        **{name: remembering(trainers[name].detector) for name in ("following", "staying")},
    }
    known = known_jammers(radar)
    jammers: dict[str, Jam | None] = {TRAINED: learned(trainers["following"].jammer, radar)}
    jammers |= {name: known[name] for name in ("barrage", "copies", "interrupted copies")}
    scene = dataclasses.replace(TRACKS, intervals=max(SHOWN))
    for name, jam in (jammers | {NONE: None}).items():
        yield {
            "section": "memory",
            "jammer": name,
            "seed": seed,
            "seconds": seconds,
            "updates": {name: trainer.updates for name, trainer in trainers.items()},
            "maps": TRACK_COUNT,
            **measure_tracks(detectors, scene, jam, TRACK_COUNT, SEED),
        }


def map_time(repeats: int = 5) -> float:
    """Least CPU seconds of a network with memory over 1,024 maps, 128 tracks of 8, forward and backward to weights."""
    scene = sample_tracks(dataclasses.replace(TRACKS, intervals=8), 128, None, torch.Generator().manual_seed(0))
    network, times = TrackingNetwork(TRACKS.moved), []
    for _ in range(repeats):
        began = time.process_time()
        network(scene.full, scene.pulse)[0].mean().backward()
        times.append(time.process_time() - began)
    return min(times)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Pd in some intervals at equal false alarms, by jammer and detector."""
    cells = []
    for jammer in (TRAINED, "barrage", "copies", "interrupted copies", NONE):
        found = [row for row in rows if row["section"] == "memory" and row["jammer"] == jammer]
        for detector, name in TRACKERS.items():
            if not found:
                continue
            shares = [[row[detector][interval - 1] for row in found] for interval in SHOWN]
            line = [f"{statistics.fmean(each):.3f}" for each in shares]
            last = ", ".join(f"{share:.3f}" for share in shares[-1])
            cells.append([jammer, name, *line[:-1], f"{line[-1]} ({last})"])
    return tables.markdown(["jammer", "detector", *(f"interval {interval}" for interval in SHOWN)], cells)


def _detectors(trainer: DetectionTrainer) -> dict[str, Any]:
    config, radar = CFARConfig(), SCENE.radar
    scores = (cfar_scores(radar, config), cfar_scores(radar, config, adaptive=True), trainer.detector)
    return dict(zip(DETECTORS, scores, strict=True))


def recovery_rows(seed: int, seconds: float | None) -> Iterator[dict[str, Any]]:
    """A row per signal-to-noise ratio."""
    seconds = RECOVERY_SECONDS if seconds is None else seconds
    config = RecoveryConfig(minutes=seconds / 60, clock="cpu", seed=seed)
    trainer = RecoveryTrainer(config)
    while not trainer.finished:
        trainer.iterate()
    for ratio in RATIOS:
        found = similarities(trainer.network, config, ratio, 2048, SEED)
        yield {
            "section": "recovery",
            "snr": ratio,
            "seed": seed,
            "seconds": seconds,
            "updates": trainer.updates,
            "heard": {family: before for family, (before, _) in found.items()},
            "recovered": {family: after for family, (_, after) in found.items()},
        }


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    """Share of all targets found and half of the 95% interval."""
    mean, count = statistics.fmean(row[name] for row in rows), sum(row["maps"] for row in rows)
    return f"{mean:.3f} ± {1.96 * math.sqrt(mean * (1 - mean) / count):.3f}"


def detection_table(rows: list[dict[str, Any]]) -> str:
    """Pd at equal false alarms by jammer, and whether the goal is reached."""
    cells = []
    for name in (TRAINED, UNTRAINED, PAST, *known_jammers(SCENE.radar), NONE, PRESENT):
        found = [row for row in rows if row["section"] == "detection" and row["jammer"] == name]
        if not found:
            continue
        gains = [row["network"] - row["cfar"] for row in found]
        gain = f"{statistics.fmean(gains):+.3f} ({', '.join(f'{one:+.3f}' for one in gains)})"
        alarms = statistics.fmean(row["false_alarms"]["network"] for row in found)
        verdict = tables.outcome(statistics.fmean(gains), GOAL, AIM) if name == TRAINED else ""
        cells.append([name, *(_mean(found, detector) for detector in DETECTORS), gain, f"{alarms:.1e}", verdict])
    head = ["jammer", *DETECTORS.values(), "gain over the CA-CFAR", "false alarms at one limit", ""]
    return tables.markdown(head, cells)


def pulse_table(rows: list[dict[str, Any]]) -> str:
    """Pd of random codes and of those that learned."""
    cells = []
    for name in (TRAINED, "barrage"):
        for stage in ("random", "learned"):
            found = [row for row in rows if row["section"] == "pulses" and row["jammer"] == name]
            found = [row for row in found if row["memory"] == stage]
            if found:
                sidelobe = statistics.fmean(row["peak_sidelobe"] for row in found)
                cells.append([name, stage, *(_mean(found, x) for x in DETECTORS), f"{sidelobe:.1f}"])
    return tables.markdown(["jammer", "codes", *DETECTORS.values(), "peak sidelobe, dB"], cells)


def recovery_table(rows: list[dict[str, Any]]) -> str:
    """Similarity by signal-to-noise ratio and family, as heard and recovered."""
    cells = []
    for ratio in RATIOS:
        found = [row for row in rows if row["section"] == "recovery" and row["snr"] == ratio]
        if not found:
            continue
        line = [f"{ratio:g}", f"{statistics.fmean(row['heard'][FAMILIES[0]] for row in found):.3f}"]
        for family in FAMILIES:
            each = [row["recovered"][family] for row in found]
            line.append(f"{statistics.fmean(each):.3f} ({', '.join(f'{one:.3f}' for one in each)})")
        cells.append(line)
    return tables.markdown(["dB per sample", "as heard", *FAMILIES], cells)

"""Networks of detector and jammer: what they may depend on, who learns from what, and what a measurement means."""

import copy
import dataclasses
import math

import pytest
import torch

from worldmodel.environments.radar.config import CFARConfig
from worldmodel.environments.radar.expectation import expected_detection
from worldmodel.environments.radar.jamming import barrage, spot
from worldmodel.environments.radar.receiver import adaptive_filter, matched_filter
from worldmodel.environments.radar.theory import cfar_factor, power
from worldmodel.environments.radar.waveforms import LFM
from worldmodel.learning.detection_game import (
    DetectionTrainConfig,
    DetectionTrainer,
    SceneConfig,
    best_response,
    cfar_scores,
    detection_loss,
    known_jammers,
    learned,
    measure,
    sample_scene,
)
from worldmodel.learning.detection_networks import DetectionNetwork, JammerNetwork
from worldmodel.learning.pulse_recovery import (
    FAMILIES,
    RecoveryConfig,
    RecoveryNetwork,
    RecoveryTrainer,
    compressed,
    intercepted,
    sample_pulses,
    similarities,
    similarity,
)

SCENE = SceneConfig()
RADAR = SCENE.radar
TRAIN = DetectionTrainConfig(batch_size=8, updates=6, turn=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(module):
    return [value.detach().clone() for value in module.parameters()]


def same(module, before):
    return all(torch.equal(value, old) for value, old in zip(module.parameters(), before, strict=True))


# Receiver


def test_a_filter_that_estimates_the_spectrum_keeps_noise_at_power_one_and_hears_beside_a_spot():
    ratio, pulse = torch.full((512,), 20.0), SCENE.sample_pulses(512, None, seeded())[0][:, None]
    noise = barrage(RADAR, torch.ones(512), seeded(1))
    jammed = noise + spot(RADAR, ratio, 0.1, 0.25, seeded(2))
    echo = torch.nn.functional.pad(pulse, (20, 28)) * math.sqrt(0.1)
    for received in (noise, jammed):
        assert adaptive_filter(received, pulse).abs().square().mean() == pytest.approx(1, abs=0.02)
    gains = {}
    for receive in (matched_filter, adaptive_filter):
        quiet, found = (receive(x, pulse)[..., 20].abs().square().mean() for x in (jammed, jammed + echo))
        gains[receive] = float(found / quiet)
    assert gains[adaptive_filter] > gains[matched_filter] * 1.3
    flat = adaptive_filter(noise, pulse, smoothing=63)
    assert (flat - matched_filter(noise, pulse)).abs().square().mean() < 0.03, "as the matched filter in white noise"


# Networks


def test_a_detector_follows_range_and_does_not_see_the_level():
    torch.manual_seed(0)
    detector, scene = DetectionNetwork(), sample_scene(SCENE, 3, None, seeded())
    logits = detector(scene.full, scene.pulse)
    assert logits.shape == scene.full.shape and logits.std() > 0
    assert torch.allclose(detector(30 * scene.full, scene.pulse), logits, atol=1e-4)
    assert torch.allclose(detector(scene.full.roll(9, -1), scene.pulse), logits.roll(9, -1), atol=1e-4)
    other = detector(scene.full, scene.pulse.roll(1, 0))
    assert (other - logits).abs().max() > 0.01, "it knows the pulse"


def test_a_jammer_has_the_power_that_it_may_have_and_hears_the_pulse():
    torch.manual_seed(0)
    jammer, pulse = JammerNetwork(), SCENE.sample_pulses(4, None, seeded())[0].requires_grad_()
    ratio = torch.tensor([0.0, 1.0, 5.0, 20.0])
    signal = jammer(pulse, ratio, 8, 64, seeded(1))
    assert torch.allclose(signal.abs().square().mean((1, 2)), ratio, rtol=1e-4)
    assert torch.autograd.grad(signal[3, 0, 0].real, pulse)[0].abs().max() > 0
    again = (jammer(pulse, ratio, 8, 64, seeded(seed)) for seed in (1, 2))
    assert [torch.equal(signal, other) for other in again] == [True, False]


def test_pulses_heard_are_not_those_sent_unless_the_radar_stays_with_one():
    pulses = torch.polar(torch.ones(3, 16), torch.arange(3.0)[:, None].expand(-1, 16))
    sent, heard = SCENE.sample_pulses(300, pulses, seeded())
    assert not (sent == heard).all(1).any() and len(sent.angle()[:, 0].unique()) == 3
    sent, heard = SCENE.sample_pulses(300, None, seeded())
    assert similarity(sent, heard).mean() < 0.3 and torch.allclose(sent.abs(), torch.ones(300, 16))
    stays = dataclasses.replace(SCENE, agile=False)
    assert all(torch.equal(*stays.sample_pulses(5, known, seeded())) for known in (None, pulses))


@pytest.mark.parametrize("name", known_jammers(RADAR))
def test_known_jammers_are_as_strong_as_the_scene_says_while_they_last(name):
    """10 dB over a sample of the echo, whose 128 samples add up to 13 dB."""
    assert SCENE.jnr == pytest.approx(20 * 10 / 128, rel=0.01)
    pulse = SCENE.sample_pulses(400, None, seeded())[0]
    signal = known_jammers(RADAR)[name](pulse, torch.full((400,), SCENE.jnr), seeded(1))
    share = {"copies": 4 * 16 / 64, "interrupted copies": 2 * 8 / 64}.get(name, 1.0)
    assert signal.abs().square().mean() == pytest.approx(SCENE.jnr * share, rel=0.1)


# The game


def test_each_side_learns_alone_and_in_its_own_direction():
    trainer = DetectionTrainer(SCENE, TRAIN)
    detector, jammer = weights(trainer.detector), weights(trainer.jammer)
    trainer.update_jammer()
    assert same(trainer.detector, detector) and not same(trainer.jammer, jammer)
    jammer = weights(trainer.jammer)
    trainer._step(trainer._loss(trainer.jammer), trainer._optimizers[0])
    assert same(trainer.jammer, jammer) and not same(trainer.detector, detector)

    torch.manual_seed(0)
    detector = DetectionNetwork()
    frozen = copy.deepcopy(detector)
    strong = DetectionTrainConfig(batch_size=16, updates=1, seed=1, lr=1e-2)
    trained = best_response(detector, SCENE, strong, 12)
    assert same(detector, weights(frozen))
    before = DetectionTrainer(SCENE, strong).jammer
    losses = [
        float(detection_loss(detector, sample_scene(SCENE, 256, learned(one, RADAR), seeded()), 0.1).detach())
        for one in (before, trained)
    ]
    assert losses[1] > losses[0], "the jammer raises what the detector lowers"


def test_a_pool_keeps_past_jammers_as_they_were_and_pulses_learn_with_the_detector():
    phases = torch.nn.Parameter(torch.rand(2, 16, generator=seeded()))
    first = phases.detach().clone()
    trainer = DetectionTrainer(SCENE, TRAIN, phases)
    while not trainer.finished:
        trainer.iterate()
    assert trainer.updates == 6 and trainer.pool[0] is None and len(trainer.pool) == 3
    assert not same(trainer.pool[1], weights(trainer.pool[2]))
    assert (phases - first).abs().max() > 1e-3
    assert {id(trainer._opponent()) for _ in range(64)} == {id(one) for one in [*trainer.pool, trainer.jammer]}


def test_a_measurement_is_the_probability_of_detection_at_the_false_alarms_asked_for():
    """Seed 0: LFMs in noise, a CFAR at 1e-2, 2,048 targets; 3σ is .03."""
    lfm = LFM(16)().detach()
    detectors = {"cfar": cfar_scores(RADAR, CFARConfig()), "random": lambda received, pulse: received.real}
    nominal = {"cfar": math.log(cfar_factor(1e-2, 16)), "random": math.inf}
    pulses = torch.stack([lfm, lfm.conj()])
    found = measure(detectors, SCENE, None, 2048, 0, 1e-2, nominal, batch=300, pulses=pulses)
    turns = RADAR.doppler_of_row(torch.arange(8)).tolist()
    given = (lfm.to(torch.complex128), power(SCENE.snr), CFARConfig(false_alarm=1e-2), 64)
    exact = sum(float(expected_detection(*given, doppler=doppler)) for doppler in turns) / 8
    assert found["cfar"].detection == pytest.approx(exact, abs=0.035)
    assert found["cfar"].limit == pytest.approx(nominal["cfar"], abs=0.03)
    assert found["cfar"].alarms == pytest.approx(1e-2, rel=0.05)
    assert found["random"].alarms == 0 and found["random"].detection < 0.1


def test_a_little_training_finds_targets_that_an_untrained_network_does_not():
    config = dataclasses.replace(TRAIN, past=1.0, turn=1000, jammer_every=10, updates=40, lr=1e-2)  # noise alone
    trainer = DetectionTrainer(SCENE, config)
    untrained = copy.deepcopy(trainer.detector)
    while not trainer.finished:
        trainer.iterate()
    found = measure({"before": untrained, "after": trainer.detector}, SCENE, None, 512, 7, 1e-2)
    assert found["after"].detection > found["before"].detection + 0.2


# Recovery of pulses


def test_pulses_are_of_their_families():
    for family in FAMILIES:
        pulses = sample_pulses(family, 5, 64, 16, seeded())
        assert pulses.shape == (5, 64) and torch.allclose(pulses.abs(), torch.ones(5, 64))
        frequency = (pulses[:, 1:] * pulses[:, :-1].conj()).angle() / (2 * math.pi)
        if family == "phase code":
            assert (frequency.abs() > 1e-4).sum(1).max() <= 15
            continue
        degree = 1 if family == "LFM" else 3
        last, none = (torch.diff(frequency, n=order) for order in (degree, degree + 1))
        assert (none - none.round()).abs().max() < 1e-4 < (last - last.round()).abs().max(), "but for whole turns"
    with pytest.raises(ValueError, match="family 'Barker', 64 samples and 16 chips, expected one of"):
        sample_pulses("Barker", 1, 64, 16, None)
    with pytest.raises(ValueError, match="60 samples and 16 chips"):
        sample_pulses("LFM", 1, 60, 16, None)


def test_similarity_is_what_is_left_of_the_peak_after_compression():
    pulses = sample_pulses("phase code", 2000, 64, 16, seeded())
    heard = intercepted(pulses, torch.full((2000,), 2.0), seeded(1))
    assert heard.abs().square().mean() == pytest.approx(1, abs=0.01)
    assert similarity(heard, pulses).mean() == pytest.approx(math.sqrt(2 / 3), abs=0.005)
    assert torch.allclose(similarity(3j * pulses, pulses), torch.ones(2000))
    peak = compressed(heard, pulses)[:, 0].abs() / heard.norm(dim=1) * pulses.norm(dim=1)
    assert torch.allclose(similarity(heard, pulses), peak, atol=1e-5)


def test_a_recovered_pulse_follows_the_phase_of_what_was_heard():
    torch.manual_seed(0)
    network, heard = RecoveryNetwork(RecoveryConfig(width=8)), sample_pulses("LFM", 3, 64, 16, seeded())
    turned = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
    assert torch.allclose(network(heard * turned), network(heard) * turned, atol=1e-5)
    assert (network(heard) - heard).abs().max() > 0.01


def test_a_recovery_network_learns_to_remove_noise():
    config = RecoveryConfig(width=16, layers=2, batch_size=24, updates=60)
    trainer = RecoveryTrainer(config)
    judge = weights(trainer.discriminator)
    while not trainer.finished:
        metrics = trainer.iterate()
    assert not same(trainer.discriminator, judge) and all(math.isfinite(value) for value in metrics.values())
    for family, (heard, recovered) in similarities(trainer.network, config, 3.0, 256, 5).items():
        assert recovered > heard + 0.01, family

"""Radar: theory, the sampled chain and the exact expectation agree; signals are what their parameters say."""

import doctest
import math
import pathlib

import pytest
import torch

from worldmodel.environments.radar import quality
from worldmodel.environments.radar.config import BOLTZMANN, LIGHT, CFARConfig, RadarConfig, Targets
from worldmodel.environments.radar.design import DesignConfig, design
from worldmodel.environments.radar.echoes import echoes, fluctuation, normal, response
from worldmodel.environments.radar.expectation import detection_of, expected_detection
from worldmodel.environments.radar.interval import Jamming, sample_interval
from worldmodel.environments.radar.jamming import CopyConfig, barrage, repeat, smear, spot, sweep
from worldmodel.environments.radar.receiver import (
    cfar_threshold,
    detect,
    doppler_filter,
    matched_filter,
    range_doppler_map,
    soft_detect,
)
from worldmodel.environments.radar.theory import (
    albersheim,
    cfar_detection_probability,
    cfar_factor,
    decibel,
    detection_probability,
    power,
    threshold,
)
from worldmodel.environments.radar.waveforms import BARKER_13, LFM, FreeFM, PhaseCode
from worldmodel.runs.fields import ConfigurationError

SMALL = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=8)  # 16 samples, 64 cells
FALSE_ALARM = 1e-4
TRIALS = 10**6
FLOAT64 = torch.zeros((), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def within(count, trials, probability, sigmas=3):
    """Whether ``count`` of ``trials`` is within ``sigmas`` standard deviations of the binomial distribution."""
    return abs(count - trials * probability) <= sigmas * math.sqrt(trials * probability * (1 - probability))


# Theory


@pytest.mark.parametrize(
    "arguments, decibels",
    [((0.9, 1e-6, 1), 13.115), ((0.9, 1e-6, 10), 4.990), ((0.9, 1e-4, 1), 11.674), ((0.5, 1e-6, 1), 11.232)],
)
def test_albersheim_has_its_published_values(arguments, decibels):
    assert abs(albersheim(*arguments) - decibels) < 0.001


@pytest.mark.parametrize("pulses, error", [(1, 0.1), (10, 0.3), (100, 0.1)])
@pytest.mark.parametrize("false_alarm", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("detection", [0.5, 0.7, 0.9])
def test_albersheim_is_near_the_exact_probability_of_the_square_law(detection, false_alarm, pulses, error):
    """It was made for a linear detector, which differs from the square law between one and many pulses."""
    needed = albersheim(detection, false_alarm, pulses)
    bounds = torch.tensor([power(needed - error), power(needed + error)], dtype=torch.float64)
    low, high = detection_probability(bounds, false_alarm, pulses).tolist()
    assert low < detection < high


def test_albersheim_asks_too_little_for_low_probabilities():
    assert detection_probability(power(albersheim(0.1, 1e-3) + 3), 1e-3) < 0.1
    assert detection_probability(power(albersheim(0.2, 1e-7) + 0.2), 1e-7) < 0.2


@pytest.mark.parametrize("detection, pulses", [(0.9, 1), (0.5, 1), (0.9, 10)])
def test_albersheim_is_within_a_fifth_of_a_decibel_of_a_simulated_steady_target(detection, pulses):
    """Seed 1; a linear detector, its threshold the quantile of a million sums of noise where it has no formula."""
    generator, like = seeded(1), torch.zeros(())
    if pulses == 1:
        limit = math.sqrt(threshold(FALSE_ALARM))
    else:
        sums = torch.cat([normal((TRIALS // 10, pulses), generator, like).abs().sum(1) for _ in range(10)])
        limit = float(sums.topk(round(TRIALS * FALSE_ALARM)).values[-1])
    noise = normal((TRIALS // (2 * pulses), pulses), generator, like)  # a fixed phase is as good as any
    low, high = 0.0, 20.0
    for _ in range(12):
        middle = (low + high) / 2
        found = ((noise + math.sqrt(power(middle))).abs().sum(1) > limit).double().mean()
        low, high = (middle, high) if found < detection else (low, middle)
    assert abs(albersheim(detection, FALSE_ALARM, pulses) - low) < 0.2


@pytest.mark.parametrize("swerling, expected", [(0, 0.6161), (1, 0.4329)])
def test_a_million_maps_of_one_cell_detect_as_often_as_theory_says(swerling, expected):
    """Seed 2; 10 dB, false alarms at 1e-4; 3σ is .0015 of detections, .00003 of false alarms."""
    generator, snr = seeded(2), power(10)
    signal = fluctuation(swerling, (TRIALS,), 1, generator, FLOAT64)[:, 0] * math.sqrt(snr)
    noise = normal((TRIALS,), generator, FLOAT64)
    limit = threshold(FALSE_ALARM)
    exact = float(detection_probability(snr, FALSE_ALARM, swerling=swerling))
    assert abs(exact - expected) < 5e-5
    assert within(int(((signal + noise).abs() ** 2 > limit).sum()), TRIALS, exact)
    assert within(int((noise.abs() ** 2 > limit).sum()), TRIALS, FALSE_ALARM)


@pytest.mark.parametrize("swerling", range(5))
def test_several_pulses_detect_as_often_as_theory_says(swerling):
    """Seed 3; three pulses at 6 dB, 100,000 trials."""
    generator, trials = seeded(3), 10**5
    signal = fluctuation(swerling, (trials,), 3, generator, FLOAT64) * math.sqrt(power(6))
    powers = (signal + normal((trials, 3), generator, FLOAT64)).abs().square().sum(1)
    exact = float(detection_probability(power(6), FALSE_ALARM, 3, swerling))
    assert within(int((powers > threshold(FALSE_ALARM, 3)).sum()), trials, exact)


def test_the_series_agrees_with_closed_forms():
    snr = torch.tensor([0.0, 0.3, 10.0, 300.0], dtype=torch.float64)
    limit = threshold(FALSE_ALARM)
    third = (1 + 2 * snr * limit / (2 + snr) ** 2) * torch.exp(-2 * limit / (2 + snr))  # Swerling 1954, one pulse
    assert torch.allclose(detection_probability(snr, FALSE_ALARM, 1, 3), third, atol=1e-12)
    pulses, limit = 5, torch.tensor(threshold(FALSE_ALARM, 5), dtype=torch.float64)
    ratio, fewer = 1 + 1 / (pulses * snr[1:]), torch.tensor(4.0, dtype=torch.float64)
    first = torch.special.gammaincc(fewer, limit) + ratio**4 * torch.special.gammainc(fewer, limit / ratio) * torch.exp(
        -limit / (1 + pulses * snr[1:])
    )  # Swerling 1954, case 1
    assert torch.allclose(detection_probability(snr[1:], FALSE_ALARM, pulses, 1), first, atol=1e-12)
    for swerling in range(5):
        assert torch.allclose(
            detection_probability(0.0, FALSE_ALARM, 7, swerling), torch.tensor(FALSE_ALARM).double(), atol=1e-12
        )


@pytest.mark.parametrize("swerling", range(5))
def test_detection_probability_has_the_right_gradient_also_without_a_signal(swerling):
    snr = torch.tensor([0.5, 4.0, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: detection_probability(x, FALSE_ALARM, 3, swerling), snr)
    nothing = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(detection_probability(nothing, FALSE_ALARM, 3, swerling), nothing)
    little = detection_probability(1e-6, FALSE_ALARM, 3, swerling) - FALSE_ALARM
    assert math.isclose(slope, little / 1e-6, rel_tol=1e-3)


def test_a_million_rows_behind_a_cfar_detect_as_often_as_theory_says():
    """Seed 4; 16 references, Swerling 1 at 10, 15 and 20 dB, false alarms at 1e-4; 3σ is .0015."""
    config = CFARConfig(references=16, guard=2, false_alarm=FALSE_ALARM)
    generator, width, parts = seeded(4), 2 * config.reach + 1, 10
    found = dict.fromkeys((0.0, 10.0, 15.0, 20.0), 0)
    for _ in range(parts):
        powers = torch.empty(TRIALS // parts, width).exponential_(generator=generator)
        limit = cfar_threshold(powers, config)[:, config.reach]  # does not depend on the cell under test
        for decibels in found:
            signal = 1 + power(decibels) if decibels else 1.0
            found[decibels] += int((powers[:, config.reach] * signal > limit).sum())
    for decibels, expected in ((10.0, 0.335), (15.0, 0.686), (20.0, 0.884)):
        exact = float(cfar_detection_probability(power(decibels), FALSE_ALARM, 16))
        assert abs(exact - expected) < 5e-4 and within(found[decibels], TRIALS, exact)
    assert within(found[0.0], TRIALS, FALSE_ALARM)


# Signals


def test_sixty_four_pulses_gain_eighteen_decibels():
    gain = doppler_filter(torch.ones(64, 1, dtype=torch.complex128)).abs().square().max()
    assert round(decibel(float(gain)), 2) == 18.06 and math.isclose(gain, 64)


def test_the_barker_code_has_sidelobes_of_a_thirteenth():
    code = PhaseCode.binary(BARKER_13).double()().detach()
    filtered = matched_filter(torch.nn.functional.pad(code, (20, 20)), code).abs()
    sidelobe = torch.cat([filtered[:20], filtered[21:]]).max()
    assert int(filtered.argmax()) == 20 and math.isclose(sidelobe / filtered[20], 1 / 13, rel_tol=1e-6)
    assert round(quality.peak_sidelobe(quality.correlation(code)), 2) == -22.28


def test_the_radar_equation_is_that_of_the_book():
    radar = SMALL
    noise = BOLTZMANN * 290 * 10**0.3 * 10e6
    received = 100 * 1e6 * (LIGHT / 10e9) ** 2 * 2 / ((4 * math.pi) ** 3 * 500**4 * 10**0.3)
    distance, area = torch.tensor(500.0).double(), torch.tensor(2.0).double()
    assert math.isclose(radar.signal_to_noise(distance, area), received / noise, rel_tol=1e-9)
    snr = torch.tensor(40.0).double()
    back = radar.signal_to_noise(distance, radar.cross_section(distance, snr)) * radar.samples * radar.pulses
    assert math.isclose(back, snr)


def test_delays_are_exact_and_add_up():
    code = PhaseCode.sampled(16, seeded()).double()().detach()
    zero = torch.zeros(1, dtype=torch.float64)
    whole = response(code, zero + 5, zero, 64)[0]
    assert torch.allclose(whole, torch.nn.functional.pad(code, (5, 43)))
    half = response(code, zero + 2.5, zero, 63)  # without a frequency of half a turn, halves are invertible
    twice = torch.fft.fft(half)[0] ** 2 / torch.fft.fft(code, 63)
    assert torch.allclose(torch.fft.ifft(twice), torch.nn.functional.pad(code, (5, 42)))


def test_targets_appear_in_their_cells_and_rows_with_the_power_of_the_radar_equation():
    radar, waveform = SMALL, LFM(16).double()().detach()
    cells, rows = torch.tensor([10, 40]).double(), torch.tensor([3, 1]).double()
    velocity = rows / (radar.pulses * radar.cells) / radar.doppler(torch.tensor(1.0).double())
    distance = cells * radar.cell_length
    area = radar.cross_section(distance, torch.tensor([400.0, 100.0]).double())
    powers = range_doppler_map(
        radar, echoes(radar, waveform, Targets(distance[None], velocity[None], area[None]), seeded()), waveform
    )[0]
    for cell, row, snr in ((10, 3, 400), (40, 1, 100)):
        turns = row / (radar.pulses * radar.cells) * radar.samples  # within the pulse, which the filter does not match
        assert int(powers[:, cell].argmax()) == row
        assert math.isclose(
            powers[row, cell], snr * math.sin(math.pi * turns) ** 2 / (math.pi * turns) ** 2, rel_tol=0.01
        )
    assert abs(float(radar.doppler(torch.tensor(radar.unambiguous_velocity))) * radar.cells - 0.5) < 1e-6


@pytest.mark.parametrize("swerling, variance", [(0, 0.0), (1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)])
def test_fluctuations_have_mean_one_and_the_variance_of_their_kind(swerling, variance):
    amplitudes = fluctuation(swerling, (200_000,), 2, seeded(5), FLOAT64)
    powers = amplitudes.abs().square()
    assert amplitudes.shape == (200_000, 2) and abs(powers.mean() - 1) < 0.01
    assert abs(powers[:, 0].var() - variance) < 0.03 and abs(amplitudes.mean()) < 0.01
    together = (amplitudes[:, 0] * amplitudes[:, 1].conj()).mean().abs()
    assert abs(together - float(swerling not in (2, 4))) < 0.01


@pytest.mark.parametrize(
    "jam",
    [
        lambda ratio: barrage(SMALL, ratio, seeded()),
        lambda ratio: spot(SMALL, ratio, 0.25, 0.25, seeded()),
        lambda ratio: sweep(SMALL, ratio, 100.0, 0.5, seeded()),
        lambda ratio: smear(SMALL, LFM(16)(), ratio * 64 / 16, torch.zeros(400), 64, seeded()),
    ],
    ids=["barrage", "spot", "sweep", "smear"],
)
def test_jamming_has_the_power_of_its_ratio(jam):
    ratio = torch.full((400,), 5.0, requires_grad=True)
    mean = jam(ratio).abs().square().mean()
    assert abs(mean / 5 - 1) < 0.02
    (slope,) = torch.autograd.grad(mean, ratio)
    assert math.isclose(slope.sum().item(), mean.item() / 5, rel_tol=1e-3)


def test_noise_and_sweep_stay_in_their_bands():
    ratio = torch.ones(4)
    energy = torch.fft.fft(spot(SMALL, ratio, 0.25, 0.25, seeded())).abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(64)
    assert float(energy[(frequency - 0.25).abs() > 0.126].max()) < 1e-8 < float(energy[20])
    tone = sweep(SMALL, ratio, 100.0, 0.5, seeded()).flatten(1)
    turns = torch.angle(tone[:, 1:] * tone[:, :-1].conj()) / (2 * math.pi)
    assert torch.allclose(tone.abs(), torch.ones(4, 512), atol=1e-5)
    assert turns.abs().max() < 0.251 and turns.max() > 0.24 and turns.min() < -0.24
    resets = ((turns[:, :-1] > 0) & (turns[:, 1:] <= 0)).sum(1)
    assert set(resets.tolist()) <= {5, 6}, "511 samples have five periods of 100"


def test_a_copy_is_delayed_shifted_and_cut_as_configured():
    recorded = LFM(16)()
    ratio, shift = torch.tensor([100.0]), 3 / (8 * 64)
    copy = repeat(SMALL, recorded, ratio, CopyConfig(delay=20, doppler=shift, copies=2, spacing=9), seeded())
    powers = range_doppler_map(SMALL, copy, recorded)[0]
    row = powers[3]
    assert set(row.topk(2).indices.tolist()) == {20, 29} and int(powers.sum(1).argmax()) == 3
    assert abs(row[20] / (100 * 16 * 8) - 1) < 0.2
    cut = repeat(SMALL, recorded, ratio, CopyConfig(slices=4, duty=0.5), seeded())
    assert math.isclose(cut.abs().square().sum().item(), 100 * 8 * 8, rel_tol=1e-4)
    peaks = matched_filter(cut[0, 0], LFM(16)()).abs()
    others = torch.cat([peaks[2:32], peaks[32:-1]]).max()
    assert peaks.argmax() == 0 and others > 0.4 * peaks[0], "regular gaps make false targets beside the copy"


# The chain


def test_independent_cells_are_a_special_case_of_the_exact_expectation():
    config = CFARConfig()
    for snr in (0.0, 10.0, 100.0):
        sources = torch.eye(17, dtype=torch.complex128)
        sources[0, 0] = math.sqrt(1 + snr)
        assert math.isclose(detection_of(sources, config), cfar_detection_probability(snr, 1e-4, 16), rel_tol=1e-9)


LFM_UP, LFM_DOWN = LFM(16)().detach(), LFM(16, falling=True)().detach()
RATIO = 10.0


@pytest.mark.parametrize(
    "jamming", [None, "barrage", LFM_UP, LFM_DOWN], ids=["none", "barrage", "copy of the pulse", "copy of another"]
)
def test_the_sampled_chain_detects_as_often_as_the_exact_expectation(jamming):
    """Seed 6; guard cells, references of the same map; 20,000 maps of one pulse at 15 dB."""
    radar, config, trials = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=1), CFARConfig(), 20_000
    snr, ratio = torch.full((trials,), power(15)), torch.full((trials,), RATIO)
    copied = jamming if isinstance(jamming, torch.Tensor) else None
    noise = ratio if jamming == "barrage" else 0 * ratio
    interval = sample_interval(radar, LFM_UP, snr, Jamming(noise, copied, ratio, 21), 1, seeded(6))
    given = {"noise": 1 + RATIO} if jamming == "barrage" else {}
    if copied is not None:
        given = {"copied": copied.to(torch.complex128), "ratio": RATIO, "width": 21}
    waveform = LFM_UP.to(torch.complex128)
    exact = float(expected_detection(waveform, snr[0].double(), config, radar.cells, **given))
    assert within(int(interval.detected(config).sum()), trials, exact)


def test_the_chain_deviates_from_independent_cells_by_sidelobes_and_correlated_noise():
    """Correlation alone leaves false alarms near their probability; the target's sidelobes raise its own threshold."""
    config, waveform = CFARConfig(), LFM(16).double()().detach()
    alarms = float(expected_detection(waveform, 0.0, config, 64))
    assert abs(alarms / FALSE_ALARM - 1) < 0.02
    for decibels in (10, 15, 20):
        independent = float(cfar_detection_probability(power(decibels), FALSE_ALARM, 16))
        whole = float(expected_detection(waveform, power(decibels), config, 64))
        far = float(expected_detection(waveform, power(decibels), CFARConfig(guard=22), 64))
        assert independent - 0.02 < whole < far < independent + 0.001
        assert abs(far - independent) < 0.002, "guard cells as long as the pulse leave no sidelobe in the references"


def test_the_expectation_has_the_right_gradient_with_respect_to_the_waveform():
    config = CFARConfig(references=8, guard=1, false_alarm=1e-3)
    phases = (2 * math.pi * torch.rand(6, generator=seeded(7), dtype=torch.float64)).requires_grad_()
    snr = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)

    def expected(phases, snr):
        return expected_detection(torch.polar(torch.ones_like(phases), phases), snr, config, 24)

    assert torch.autograd.gradcheck(expected, (phases, snr))
    (slopes,) = torch.autograd.grad(expected(phases, snr), phases)
    assert slopes.abs().max() > 1e-3, "detection depends on the pulse"


def test_the_sampled_gradient_agrees_in_the_mean_with_the_exact_one():
    """Seed 8; of the soft CFAR's mean over 30,000 maps, with respect to the phases of a code that hides its target."""
    radar = RadarConfig(pulse=0.8e-6, repetition=3.2e-6, pulses=1)  # 8 samples, 32 cells
    config, snr = CFARConfig(references=8, guard=1, false_alarm=1e-2), torch.tensor(30.0)
    phases = (2 * math.pi * torch.rand(8, generator=seeded(8))).requires_grad_()

    def gradient(value):
        (slopes,) = torch.autograd.grad(value, phases)
        return slopes - slopes.mean()

    def waveform():
        return torch.polar(torch.ones(8), phases)

    exact = gradient(expected_detection(waveform(), snr, config, radar.cells))
    interval = sample_interval(radar, waveform(), snr.expand(30_000), None, 1, seeded(8))
    found = gradient(interval.score(config, 0.02).mean())
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.9
    assert abs(found.norm() / exact.norm() - 1) < 0.25


def test_the_sampled_gradient_of_powers_agrees_in_the_mean_with_the_exact_one():
    """Seed 9; 10,000 maps of one pulse at 13 dB, with barrage jamming as strong as the noise."""
    radar, config = RadarConfig(pulse=1.6e-6, repetition=6.4e-6, pulses=1), CFARConfig()
    powers = torch.tensor([power(13), 1.0], requires_grad=True)

    def gradient(value):
        return torch.autograd.grad(value, powers)[0]

    exact = gradient(expected_detection(LFM_UP, powers[0], config, radar.cells, 1 + powers[1]))
    jamming = Jamming(powers[1].expand(10_000))
    interval = sample_interval(radar, LFM_UP, powers[0].expand(10_000), jamming, 1, seeded(9))
    found = gradient(interval.score(config, 0.1).mean())
    assert exact[0] > 0 > exact[1] and torch.allclose(found, exact, rtol=0.1)


def test_the_soft_cfar_becomes_the_hard_one():
    powers = torch.empty(64, 40).exponential_(generator=seeded(9)) ** 2
    config = CFARConfig(references=8, false_alarm=0.05)
    hard = detect(powers, config)
    assert torch.equal(soft_detect(powers, config, 1e-6).round().bool(), hard) and 0 < hard.sum() < 640
    around = powers[:, (5 + config.offsets) % 40].mean(1) * config.factor
    assert torch.allclose(cfar_threshold(powers, config)[:, 5], around)
    strong = torch.ones(1, 64)
    strong[0, 20] = 1e12
    assert torch.allclose(cfar_threshold(strong, config)[0, 40], torch.tensor(config.factor))


# Pulses


def test_an_lfm_has_the_sidelobes_and_the_spectrum_of_the_book():
    waveform = LFM(256, 0.25)().detach()
    cut = quality.correlation(waveform, fine=4)
    assert abs(quality.peak_sidelobe(cut) + 13.5) < 0.1 and 0.85 < quality.main_lobe(cut) / 16 < 0.89
    assert 0.96 < quality.energy_in_band(waveform, 0.25) < 0.98 and quality.integrated_sidelobe(cut) < -9
    assert torch.allclose(cut[3::4], quality.correlation(waveform), atol=1e-4)


def test_the_ambiguity_function_has_volume_one():
    for waveform in (LFM(24)(), PhaseCode.sampled(24, seeded())()):
        surface = quality.ambiguity(waveform.detach(), torch.arange(24) / 24)
        assert math.isclose(surface.square().sum() / 24, 1, rel_tol=1e-4)
        assert math.isclose(surface.max(), surface[0, 23], rel_tol=1e-6)


def test_waveforms_learn():
    for module in (LFM(16), PhaseCode.sampled(16, seeded(), 2), FreeFM(16, 0.5)):
        waveform = module()
        assert torch.allclose(waveform.abs(), torch.ones(len(waveform)))
        waveform.real.sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_a_designed_pulse_has_low_sidelobes_in_its_band():
    """Aimed at −33 dB at a main lobe 1.3 times an LFM's, BT 64, with 99% of the energy in 1.2 B."""
    found = design(DesignConfig(steps=200, seed=1))
    assert found.peak_sidelobe <= -40 and found.main_lobe <= 1.25 and found.inside >= 0.99
    assert found.peak_sidelobe_doppler <= -33 and torch.allclose(found.waveform.abs(), torch.ones(256))
    again = [design(DesignConfig(time_bandwidth=16, steps=3, seed=seed)).waveform for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


# Bad input


def target(distance=500.0, velocity=0.0, area=1.0, swerling=0):
    return Targets(*(torch.tensor([[x]]) for x in (distance, velocity, area)), swerling)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RadarConfig(power=-1.0), r"RadarConfig: power \(W\) is -1.0, expected a number, more than 0"),
        (lambda: RadarConfig(noise_figure=math.nan), r"RadarConfig: noise_figure \(dB\) is nan, expected a finite"),
        (lambda: RadarConfig(pulse=25.6e-6), r"pulse is 2.56e-05 s, expected less than repetition \(2.56e-05 s\)"),
        (lambda: RadarConfig(pulse=6.43e-6), "pulse is 6.43e-06 s, 64.3 samples at 1e.07 Hz, expected a whole number"),
        (lambda: RadarConfig(bandwidth=2e7), r"bandwidth is 2e\+07 Hz, expected at most sample_rate \(1e\+07 Hz\)"),
        (
            lambda: echoes(SMALL, LFM(17)(), target(), None),
            r"waveform lasts 1.7e-06 s \(17 samples\), expected at most",
        ),
        (
            lambda: target(distance=959.4).check(SMALL),
            "distance is 959.4 m, expected more than 0 m and below .* 959.336 m",
        ),
        (lambda: target(distance=math.nan).check(SMALL), "distance is nan m"),
        (lambda: target(area=-2.0), r"cross_section is -2 \(m²\), expected a finite value of at least 0 \(m²\)"),
        (lambda: target(velocity=math.inf), r"velocity is NaN or infinite \(m/s\)"),
        (lambda: target(swerling=5), "swerling is 5, expected 0, 1, 2, 3 or 4"),
        (lambda: barrage(SMALL, torch.tensor([-1.0]), None), r"jammer-to-noise ratio is -1 \(linear\)"),
        (lambda: expected_detection(LFM_UP, math.nan, CFARConfig(), 64), r"snr is nan \(linear\)"),
        (lambda: expected_detection(LFM_UP, 1.0, CFARConfig(), 20), "take 21 cells, expected at most the map's 20"),
        (lambda: detection_probability(-1.0, 1e-4), r"snr is -1 \(linear\)"),
        (lambda: albersheim(0.9, 0.5), "albersheim: false_alarm is 0.5, expected a number, at least 1e-07"),
        (lambda: cfar_factor(1e-4, 0), "references is 0, expected a whole number, at least 1"),
        (lambda: spot(SMALL, torch.ones(1), 0.7, 0.1, None), "centre is 0.7 turns per sample"),
        (
            lambda: smear(SMALL, LFM_UP, torch.ones(1), torch.zeros(1), 65, None),
            "width is 65 samples, expected 1 to 64",
        ),
        (lambda: sweep(SMALL, torch.ones(1), 0.5, 0.1, None), "period is 0.5 samples"),
        (lambda: CopyConfig(slices=32).sampled(16), "slices is 32, expected at most the pulse's 16"),
        (lambda: DesignConfig(broadening=0.5), "broadening is 0.5, expected a number, at least 1"),
    ],
)
def test_bad_input_is_told_with_its_unit(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("page", ["radar.md"])
def test_the_page_runs(page):
    path = pathlib.Path(__file__).parents[2] / "docs" / page
    assert doctest.testfile(str(path), module_relative=False, raise_on_error=True).attempted > 10

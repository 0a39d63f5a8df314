"""The joint chain: the gradient of a game's value, through decision, detection and echo, down to the pulses."""

import math

import pytest
import torch

from worldmodel.environments.radar.config import CFARConfig, RadarConfig
from worldmodel.environments.radar.game import RadarGameConfig, detection_table
from worldmodel.environments.radar.interval import Jamming, sample_interval
from worldmodel.environments.radar.theory import power
from worldmodel.model.evaluation import lambda_returns

GAME = RadarGameConfig(
    channels=2,
    waveforms=2,
    snr=14.0,
    jnr=6.0,
    radar=RadarConfig(pulse=0.8e-6, repetition=3.2e-6, pulses=1),  # 8 samples, 32 cells
    cfar=CFARConfig(references=8, guard=1, false_alarm=1e-2),
)
COPIED = (0, 1, 0)  # the jammer copies another of the two pulses in each interval
DISCOUNT, TRIALS = 0.9, 8_000


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    phases = 2 * math.pi * torch.rand(2, 8, generator=generator, dtype=torch.float64)
    logits = torch.randn(len(COPIED), 2, generator=generator, dtype=torch.float64)
    return phases.to(dtype).requires_grad_(), logits.to(dtype).requires_grad_()


def value(detections, logits):
    """Of the first interval by Bellman's equation; ``detections`` (intervals, pulses) of what each pulse brings."""
    rewards = (logits.softmax(1) * detections).sum(1)[None]
    nothing = torch.zeros_like(rewards)
    return lambda_returns(rewards, torch.full_like(rewards, DISCOUNT), nothing, 1.0)[0, 0]


def exact(phases, logits):
    table = detection_table(GAME, torch.polar(torch.ones_like(phases), phases))
    return value(table[:, list(COPIED)].T.to(logits), logits)


def sampled(phases, logits, temperature):
    pulses, generator = torch.polar(torch.ones_like(phases), phases), torch.Generator().manual_seed(10)
    snr, none, ratio = (torch.full((TRIALS,), x) for x in (power(GAME.snr), 0.0, power(GAME.jnr)))
    rows = []
    for copied in COPIED:
        jamming = Jamming(none, pulses[copied], ratio, GAME.smear)
        intervals = [sample_interval(GAME.radar, pulse, snr, jamming, 1, generator) for pulse in pulses]
        rows.append(torch.stack([found.score(GAME.cfar, temperature).mean() for found in intervals]))
    return value(torch.stack(rows), logits)


def test_the_value_is_the_discounted_sum_of_what_the_table_says():
    phases, logits = parameters(torch.float64)
    table, policy = (
        detection_table(GAME, torch.polar(torch.ones_like(phases), phases).detach()),
        logits.detach().softmax(1),
    )
    expected = sum(DISCOUNT**t * float(policy[t] @ table[:, copied]) for t, copied in enumerate(COPIED))
    assert exact(phases, logits).item() == pytest.approx(expected)


def test_the_exact_value_has_the_right_gradient_with_respect_to_pulses_and_decisions():
    assert torch.autograd.gradcheck(exact, parameters(torch.float64), fast_mode=True)


def test_the_sampled_chain_has_the_gradient_of_the_exact_value_in_the_mean():
    """Seed 10: 8,000 maps per interval and pulse; the copies' gradient runs into the pulses as well."""
    phases, logits = parameters()
    found = torch.autograd.grad(sampled(phases, logits, 0.03), (phases, logits))
    wanted = torch.autograd.grad(exact(phases, logits), (phases, logits))
    pulses, expected = (x - x.mean(1, keepdim=True) for x in (found[0], wanted[0]))  # a common phase changes nothing
    assert expected.abs().max() > 0.01
    assert torch.nn.functional.cosine_similarity(pulses.flatten(), expected.flatten(), dim=0) > 0.9
    assert abs(pulses.norm() / expected.norm() - 1) < 0.25
    assert torch.allclose(found[1], wanted[1], atol=0.01 * float(wanted[1].abs().max()) + 2e-3)

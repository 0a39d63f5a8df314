"""Radar and jammer: pulses, echoes, jamming, detection and a game of channels, differentiable in PyTorch.

Signals are complex baseband samples in units of the receiver's noise: one sample of noise has mean power 1.

    waveforms    pulses with parameters: LFM, phase codes, free FM
    config       a radar's parameters and its radar equation
    echoes       targets: delay, Doppler, Swerling fluctuation
    jamming      barrage, spot, sweep; copies: repeated, interrupted, smeared
    receiver     matched filter, Doppler filter, CA-CFAR
    tracking     tracks of the detections of successive intervals
    theory       detection probabilities and required signal-to-noise ratios
    expectation  exact detection probability behind a CA-CFAR whose cells are correlated
    quality      sidelobes, main lobe, band and ambiguity of a pulse
    design       a pulse by gradient
    game         many games at once, and worldmodel/RadarGame-v0
    policies     baselines of the game
"""

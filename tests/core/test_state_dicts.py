"""State dicts of the previous release reproduce their outputs."""

from pathlib import Path

import pytest
import torch

from wmkernels.nn import ConvLSTM, RotaryMamba

safetensors = pytest.importorskip("safetensors.torch")
DATA = Path(__file__).with_name("data")


def saved(name):
    tensors = safetensors.load_file(DATA / f"{name}.safetensors")
    prefix = "state_dict."
    return tensors, {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_a_rotated_mamba_of_the_release_before_gives_its_outputs():
    tensors, weights = saved("rotated_mamba")
    module = RotaryMamba(8, 4, d_conv=3, expand=2, groups=2, selective_angle=True)
    module.load_state_dict(weights)
    with torch.no_grad():
        output, state = module(tensors["input"], None, tensors["reset"])
    torch.testing.assert_close(output, tensors["output"], rtol=1e-4, atol=1e-5)
    assert state.keys() == {"angle", "scan", "window"}
    for name, value in state.items():
        torch.testing.assert_close(value, tensors[f"state.{name}"], rtol=1e-4, atol=1e-5)


def test_a_conv_lstm_of_the_release_before_gives_its_outputs():
    tensors, weights = saved("conv_lstm")
    module = ConvLSTM(2, 3, 3, batch_first=True)
    module.load_state_dict(weights)
    with torch.no_grad():
        output, (hidden, cell) = module(tensors["input"], None, tensors["reset"])
    for now, name in ((output, "output"), (hidden, "hidden"), (cell, "cell")):
        torch.testing.assert_close(now, tensors[name], rtol=1e-4, atol=1e-5)

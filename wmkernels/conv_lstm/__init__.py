"""Convolutional LSTM."""

from wmkernels.conv_lstm.spec import SPEC

__all__ = ["SPEC"]

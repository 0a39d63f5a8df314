"""The depthwise causal convolution."""

from wmkernels.causal_conv1d.spec import SPEC

__all__ = ["SPEC"]

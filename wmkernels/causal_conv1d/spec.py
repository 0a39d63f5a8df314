"""The depthwise causal convolution; its GPU kernels have not run on a GPU."""

from wmkernels.registry import OpSpec, register

SPEC = register(OpSpec(name="causal_conv1d", functions=("causal_conv1d", "causal_conv1d_step")))

"""The ConvLSTM. None of its GPU kernels has run on a GPU."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="conv_lstm",
        functions=("conv_lstm", "conv_lstm_step"),
    )
)

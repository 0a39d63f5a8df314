"""ConvLSTM; its GPU kernels have not run on a GPU."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="conv_lstm",
        functions=("conv_lstm", "conv_lstm_step"),
    )
)

"""The gated delta rule; its GPU kernels have not run on a GPU."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="gated_delta_rule",
        functions=("gated_delta_rule", "gated_delta_rule_step"),
    )
)

"""The gated delta rule."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="gated_delta_rule",
        functions=("gated_delta_rule", "gated_delta_rule_step"),
    )
)

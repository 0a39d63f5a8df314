"""The gated delta rule."""

from wmkernels.gated_delta_rule.spec import SPEC

__all__ = ["SPEC"]

"""The name of ``layer_norm`` in the first releases of mamba_ssm."""

from wmkernels.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm as RMSNorm
from wmkernels.compat.mamba_ssm.ops.triton.layer_norm import layer_norm_fn as layer_norm_fn
from wmkernels.compat.mamba_ssm.ops.triton.layer_norm import rms_norm_fn as rms_norm_fn

"""mamba_ssm 2.3.2, on ``wmkernels``."""

from wmkernels.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel as MambaLMHeadModel
from wmkernels.compat.mamba_ssm.modules.mamba2 import Mamba2 as Mamba2
from wmkernels.compat.mamba_ssm.modules.mamba3 import Mamba3 as Mamba3
from wmkernels.compat.mamba_ssm.modules.mamba_simple import Mamba as Mamba
from wmkernels.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn as mamba_inner_fn
from wmkernels.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn as selective_scan_fn

__version__ = "2.3.2.post1+wmkernels"

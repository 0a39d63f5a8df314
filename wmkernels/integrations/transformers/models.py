"""Models of transformers that these kernels run: their mixers, and the functions that a mixer calls."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wmkernels.integrations.transformers import functions, mixers


class Use(NamedTuple):
    """How a function of the library is computed.

    Attributes:
        op: whose kernel must run.
        ours: takes the library's arguments.
        arguments: the library's that ``ours`` was written for, in order.
    """

    op: str
    ours: Callable[..., Any]
    arguments: str


class Mixer(NamedTuple):
    """A layer of a model.

    Attributes:
        prefix: of the names of the model's classes.
        suffix: of its class's name.
        uses: by name, the functions that it calls.
        passes_state: whether it passes a cached state to the scan of more than one step.
        before: the whole mixer in versions before 5.15, and the op of its scan; None where those are left alone.
    """

    prefix: str
    suffix: str
    uses: Mapping[str, Use]
    passes_state: bool = True
    before: tuple[mixers.Compute, str] | None = None

    @property
    def name(self) -> str:
        """Of its class."""
        return self.prefix + self.suffix


_CONV = {
    "causal_conv1d_fn": Use("causal_conv1d", functions.conv, "hidden_states weight bias activation kwargs"),
    "causal_conv1d_update": Use(
        "causal_conv1d", functions.conv_update, "hidden_states conv_state weight bias activation"
    ),
}
_STEP = "state hidden_states dt A B C D dt_bias dt_softplus z kwargs"
_MAMBA = _CONV | {
    "mamba_selective_scan": Use(
        "selective_scan",
        functions.scan,
        "hidden_states dt A B C D z delta_bias delta_softplus return_last_state use_mambapy "
        "use_associative_scan kwargs",
    ),
    "mamba_selective_state_update": Use("selective_step", functions.state_update, _STEP),
}
_MAMBA_FUSED = _MAMBA | {
    "mamba_inner_fn": Use(
        "selective_scan",
        functions.fused,
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D "
        "delta_bias delta_softplus b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps kwargs",
    )
}
_MAMBA2 = _CONV | {
    "mamba2_split_conv1d_scan_combined": Use(
        "ssd_scan",
        functions.fused,
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states dt_limit return_final_states "
        "activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim ngroups norm_before_gate kwargs",
    ),
    "mamba2_chunk_scan": Use(
        "ssd_scan",
        functions.chunk_scan,
        "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus dt_limit return_final_states kwargs",
    ),
    "mamba2_selective_state_update": Use("ssd_scan", functions.head_state_update, _STEP),
}
_DELTA_OPTIONS = "initial_state output_final_state use_qk_l2norm_in_kernel kwargs"
_DELTA = _CONV | {
    "torch_chunk_gated_delta_rule": Use(
        "gated_delta_rule", functions.delta_rule, f"query key value g beta chunk_size {_DELTA_OPTIONS}"
    ),
    "torch_recurrent_gated_delta_rule": Use(
        "gated_delta_rule", functions.delta_step, f"query key value g beta {_DELTA_OPTIONS}"
    ),
}

# by the name of the model's folder
MODELS: Mapping[str, Mixer] = {
    "mamba": Mixer("Mamba", "Mixer", _MAMBA_FUSED, passes_state=False, before=(mixers.mamba, "selective_scan")),
    "falcon_mamba": Mixer("FalconMamba", "Mixer", _MAMBA, passes_state=False, before=(mixers.mamba, "selective_scan")),
    "jamba": Mixer("Jamba", "MambaMixer", _MAMBA, passes_state=False, before=(mixers.mamba, "selective_scan")),
    "zamba": Mixer("Zamba", "MambaMixer", _MAMBA, passes_state=False, before=(mixers.mamba_heads, "selective_scan")),
    "mamba2": Mixer("Mamba2", "Mixer", _MAMBA2, before=(mixers.mamba2, "ssd_scan")),
    "zamba2": Mixer("Zamba2", "MambaMixer", _MAMBA2, before=(mixers.mamba2_least_step, "ssd_scan")),
    "bamba": Mixer("Bamba", "Mixer", _MAMBA2, before=(mixers.mamba2, "ssd_scan")),
    "falcon_h1": Mixer("FalconH1", "Mixer", _MAMBA2, before=(mixers.mamba2, "ssd_scan")),
    "granitemoehybrid": Mixer("GraniteMoeHybrid", "MambaLayer", _MAMBA2, before=(mixers.mamba2, "ssd_scan")),
    "nemotron_h": Mixer("NemotronH", "Mamba2Mixer", _MAMBA2, before=(mixers.mamba2_least_step, "ssd_scan")),
    "qwen3_next": Mixer("Qwen3Next", "GatedDeltaNet", _DELTA),
    "qwen3_5": Mixer("Qwen3_5", "GatedDeltaNet", _DELTA),
    "qwen3_5_moe": Mixer("Qwen3_5Moe", "GatedDeltaNet", _DELTA),
    "olmo_hybrid": Mixer("OlmoHybrid", "GatedDeltaNet", _DELTA),
}

"""A new run's weights from another run, for fine-tuning."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worldmodel.runs.run import Run, RunError

_NAMED = 3  # tensors in the message


def warm_start(module: nn.Module, run: Run, part: str) -> str:
    """Copies each tensor of the newest checkpoint whose name and shape ``module`` has; the others keep their values.

    So do heads of scalars in bins of other values, and moments of the first batch in a part that has new weights.

    Running statistics and target networks are copied as well, optimisers are not.

    Args:
        module: a world model.
        run: to copy from.
        part: of its checkpoint, "world_model" or "ema".

    Returns:
        What was copied, and what was not, in a line.

    Raises:
        RunError: no checkpoint, a damaged one, NaN or infinity in it, or one in which no matrix fits: vectors may fit
            by chance.
    """
    saved = run.load_tensors(part)
    present = module.state_dict()
    other = _heads_with_other_bins(saved, present)
    fits = {
        name: saved[name]
        for name, value in present.items()
        if _fits(saved.get(name), value) and not name.startswith(other)
    }
    parameters = dict(module.named_parameters())
    again = _to_standardise_again(present, [name for name in parameters if name not in fits])
    fits = {name: value for name, value in fits.items() if not name.startswith(again)}
    copied = sum(parameters[name].numel() for name in fits if name in parameters)
    total = sum(parameter.numel() for parameter in parameters.values())
    checkpoint = run.checkpoints[-1]
    new = [
        _difference(name, saved.get(name), value)
        for name, value in present.items()
        if name not in fits and not name.startswith(again)
    ]
    if not any(parameters[name].dim() > 1 for name in fits if name in parameters):
        raise RunError(f"no weights of {checkpoint} fit this world model: {_some(new)}")
    module.load_state_dict(fits, strict=False)
    rest = f"; new: {_some(new)}" if new else ""
    return f"{copied:,} of {total:,} parameters start from {checkpoint}{rest}"


def _heads_with_other_bins(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of scalar heads whose logits are of other values."""
    bins = [name for name, value in present.items() if name.endswith(".centers") and _fits(saved.get(name), value)]
    return tuple(name.removesuffix("centers") for name in bins if not torch.equal(saved[name], present[name]))


def _to_standardise_again(present: Mapping[str, Tensor], new: list[str]) -> tuple[str, ...]:
    """Prefixes of ``FirstBatchNorm`` in parts of the model with ``new`` parameters, whose features are others."""
    norms = [name.removesuffix("begun") for name in present if name.endswith(".begun")]
    parts = {name.partition(".")[0] for name in new}
    return tuple(norm for norm in norms if norm.partition(".")[0] in parts)


def _fits(saved: Tensor | None, present: Tensor) -> bool:
    return isinstance(saved, Tensor) and saved.shape == present.shape and saved.dtype == present.dtype


def _difference(name: str, saved: Tensor | None, present: Tensor) -> str:
    there, here = "nothing" if saved is None else f"{tuple(saved.shape)}", f"{tuple(present.shape)}"
    return f"{name} (other bins)" if there == here else f"{name} ({there} there, {here} here)"


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return f"{', '.join(texts[:_NAMED])}{more}"

"""Which learning rate a tuning tries next."""

from collections.abc import Sequence


def beyond(tried: Sequence[tuple[float, float | None]]) -> float | None:
    """Half the lowest rate or twice the highest, if only that one has the lowest loss of (rate, loss); else None.

    Loss None is of a run that diverged.
    """
    rates = sorted(rate for rate, _ in tried)
    least = min((loss for _, loss in tried if loss is not None), default=None)
    best = {rate for rate, loss in tried if loss is not None and loss == least}
    if not best:
        return None
    if best == {rates[0]}:
        return rates[0] / 2
    return 2 * rates[-1] if best == {rates[-1]} else None

"""What the runs should reach: of each target the worst seed, in its worst bucket of gaps or in several together."""

from dataclasses import dataclass
from typing import Any

from harness.tables import outcome
from worldmodel.environments.returning import BUCKETS

TITLE = "The worst seed in its worst bucket; gaps over 32 together"
HEADER = ("target", "at least", "aim", "measured", "")
OVER_32 = tuple(bucket for bucket in BUCKETS if int(bucket.split("-")[0].rstrip("+")) > 32)
DRIFT = ("unseen for 5-64", "unseen for 65-256")


@dataclass(frozen=True)
class Target:
    """Percent of the cells of ``kinds`` that a row's longest training foresees in ``test``.

    Attributes:
        at_least: None if only the curve counts.
        pooled: of all ``kinds`` together; else of each, where the lowest may be of a few cells.
    """

    name: str
    row: str
    test: str
    aim: float
    at_least: float | None = 99.9
    kinds: tuple[str, ...] = BUCKETS
    pooled: bool = False

    def measured(self, result: dict[str, Any]) -> float | None:
        runs = [run for run in result["runs"].values() if run["row"] == self.row and self.test in run["tests"]]
        longest = max((run["minutes"] for run in runs), default=0)
        found = [self._shares(run["tests"][self.test]) for run in runs if run["minutes"] == longest]
        shares = [share for shares in found for share in shares]
        return 100 * min(shares) if shares else None

    def _shares(self, test: dict[str, Any]) -> list[float]:
        seen = [test[kind] for kind in self.kinds if test.get(kind, {}).get("cells")]
        if self.pooled and seen:
            return [sum(kind["cells"] * kind["accuracy"] for kind in seen) / sum(kind["cells"] for kind in seen)]
        return [kind["accuracy"] for kind in seen]


GIVEN, LEARNED = "place, motion given", "place, moves learned"
TARGETS = (
    Target("10,240 steps after training on 128, motion given", GIVEN, "10,240 steps", 100),
    Target("edited cells", "place, motion given, edits", "10,240 steps, edits", 100, kinds=("returning, edited",)),
    Target("moves and bumps learned", LEARNED, "10,240 steps, bumps", 100),
    Target("131,072 steps", GIVEN, "131,072 steps", 100),
    Target("1,048,576 steps", GIVEN, "1,048,576 steps", 100),
    Target("room of 21, same weights", GIVEN, "room of 21", 100),
    Target("own heading, same weights", GIVEN, "own heading", 100),
    Target("two agents, same weights", GIVEN, "two agents", 100),
    Target("pixels, moves learned, 2,048 steps", "place, pixels, moves learned", "2,048 steps, pixels", 100, 95),
    Target("pixels, moves learned, 10,240 steps", "place, pixels, moves learned", "10,240 steps, pixels", 100, None),
    *(
        Target(f"drift, {kind}", "place, drift", "10,240 steps, drift", 99, least, (kind,))
        for kind, least in zip(DRIFT, (95, 88), strict=True)
    ),
    Target(
        "block scan and local attention, no motion given, gaps over 32",
        "block scan and local attention",
        "10,240 steps",
        90,
        None,
        OVER_32,
        pooled=True,
    ),
)


def table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows."""
    rows = []
    for target in TARGETS:
        value = target.measured(result)
        bounds = ("" if bound is None else f"{bound:g}%" for bound in (target.at_least, target.aim))
        rows.append([target.name, *bounds, "" if value is None else f"{value:.3f}%"])
        rows[-1].append(outcome(value, target.at_least, target.aim))
    return HEADER, rows

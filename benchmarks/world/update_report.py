"""Table of benchmarks/update_memory.py."""

from typing import Any

from harness.tables import figure, megabytes

HEADER = ("frames", "preset", "batch", "before: MiB", "an update adds: MiB", "CPU seconds")


def cells(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            row["frames"],
            row["way"],
            f"{row['rows']} x {row['window']}",
            megabytes(row["before"]),
            megabytes(row["after"] - row["before"]),
            figure(row["seconds"]),
        ]
        for row in result["rows"]
    ]

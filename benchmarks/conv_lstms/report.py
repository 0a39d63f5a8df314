"""The result of a run as tables: on the terminal, and the same cells for the pages."""

from typing import Any

from harness import environment, tables
from harness.tables import figure, megabytes
from scans.report import group_rows, target_table, verdict_line

HEADER = ("", "ms", "time over ours", "of the limit", "saved MiB", "peak MiB", "threads", "repeats", "error")


def cells(row: dict[str, Any]) -> list[str]:
    if "milliseconds" not in row:
        return [row["contender"], "failed", *("" for _ in HEADER[2:])]
    share = row.get("share_of_limit")
    return [
        row["contender"],
        figure(row["milliseconds"]),
        f"{figure(row['ratio'])}×" if "ratio" in row else "",
        "" if share is None else f"{100 * share:.0f}%",
        megabytes(row.get("saved_bytes")),
        megabytes(row["peak_bytes"]),
        "" if row["threads"] is None else str(row["threads"]),
        str(row["repeats"]),
        f"{row['error_against_float64']:.0e}",
    ]


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Why a row failed."""
    return [f"{row['contender']}: {row['error']}" for row in rows if "error" in row]


def limit_line(result: dict[str, Any]) -> str:
    used = result["limits"]["used"]
    parts = []
    if result["device"] == "cpu" and "multiply_add" in used:
        parts.append(f"{16 * used['multiply_add'] / 1e9:.0f} G fp32 multiply-adds a second")
    if "matrix" in used:
        parts.append(f"{used['matrix'] / 1e12:.0f} T multiply-adds a second in a matrix product")
    return "limits measured: " + "; ".join([*parts, f"copies {used['copy'] / 1e9:,.1f} GB a second, read and written"])


def show(result: dict[str, Any]) -> None:
    print(environment.summary(result["environment"]))
    print(limit_line(result))
    print("time over ours: over the first row's; of the limit: see conv_lstms/problems.py\n")
    for title, rows in group_rows(result).items():
        tables.show(title, HEADER, [cells(row) for row in rows])
        for note in notes(rows):
            print(f"  {note}")
        print()
    if result["targets"]:
        tables.show("targets", *target_table(result["targets"]))
        print()
    print(verdict_line(result))
    print(f"{result['seconds']:.0f} s in all")

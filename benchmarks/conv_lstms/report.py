from typing import Any

from conv_lstms import targets
from harness import environment, tables
from harness.tables import figure, megabytes
from scans.report import group_rows, target_table, verdict_line

HEADER = ("", "ms", "time over ours", "% of roofline", "saved MiB", "peak MiB", "threads", "repeats", "error")


def cells(row: dict[str, Any]) -> list[str]:
    if "milliseconds" not in row:
        return [row["implementation"], "failed", *("" for _ in HEADER[2:])]
    fraction = row.get("roofline_fraction")
    return [
        row["implementation"],
        figure(row["milliseconds"]),
        f"{figure(row['ratio'])}×" if "ratio" in row else "",
        "" if fraction is None else f"{100 * fraction:.0f}%",
        megabytes(row.get("saved_bytes")),
        megabytes(row["peak_bytes"]),
        "" if row["threads"] is None else str(row["threads"]),
        str(row["repeats"]),
        f"{row['error_against_float64']:.0e}",
    ]


def notes(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['implementation']}: {row['error']}" for row in rows if "error" in row]


def limit_line(result: dict[str, Any]) -> str:
    used = result["limits"]["used"]
    parts = []
    if result["device"] == "cpu" and "multiply_add" in used:
        parts.append(f"{16 * used['multiply_add'] / 1e9:.0f} G fp32 multiply-adds per second")
    if "matrix" in used:
        parts.append(f"{used['matrix'] / 1e12:.0f} T multiply-adds per second in a matrix product")
    return "measured peak rates: " + "; ".join(
        [*parts, f"copies {used['copy'] / 1e9:,.1f} GB per second, read and written"]
    )


def show(result: dict[str, Any]) -> None:
    print(environment.summary(result["environment"]))
    print(limit_line(result))
    print("time over ours: over the first row's; % of roofline: see conv_lstms/problems.py\n")
    for title, rows in group_rows(result).items():
        tables.show(title, HEADER, [cells(row) for row in rows])
        for note in notes(rows):
            print(f"  {note}")
        print()
    if assessed := targets.assess(result):
        tables.show("targets", *target_table(assessed))
        print()
    print(verdict_line(result))
    print(f"{result['seconds']:.0f} s in all")

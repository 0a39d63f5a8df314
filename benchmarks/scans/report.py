import re
from typing import Any

from harness import environment, tables
from harness.tables import figure, megabytes
from scans import targets

HEADER = ("", "ms", "ns/element", "ratio", "% of roofline", "peak MiB", "threads", "repeats", "error")
TARGET_HEADER = ("target", "at least", "aim", "measured", "at the roofline", "")
OUTCOMES = {"aim": "aim reached", "pass": "reached", "missed": "missed"}


def row_name(row: dict[str, Any]) -> str:
    """Implementation, and what differs in its group."""
    parts = [row["implementation"]]
    if row["backend"] is not None:
        if row["channel_last"]:
            parts.append("channel_last")
        if row["gated"]:
            parts.append("z, bias, softplus")
        if row["dtype"] != "float32":
            parts.append(row["dtype"])
    return ", ".join(parts)


def cells(row: dict[str, Any], with_time: bool = False) -> list[str]:
    name = row_name(row) + (f", {row['time']:,} steps" if with_time else "")
    if "milliseconds" not in row:
        return [name, "failed", *("" for _ in HEADER[2:])]
    fraction = row.get("roofline_fraction")
    return [
        name,
        figure(row["milliseconds"]),
        figure(row["ns_per_element"]),
        figure(row.get("ratio")),
        "" if fraction is None else f"{100 * fraction:.0f}%",
        megabytes(row["peak_bytes"]),
        "" if row["threads"] is None else str(row["threads"]),
        str(row["repeats"]),
        f"{row['error_against_float64']:.0e}",
    ]


def group_rows(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["group"], []).append(row)
    return found


def group_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    several = len({row["time"] for row in rows}) > 1
    return [cells(row, several) for row in rows]


def notes(rows: list[dict[str, Any]]) -> list[str]:
    failures = [f"{row_name(row)}: {row['error']}" for row in rows if "error" in row]
    remarks = [f"{row['implementation']}: {row['note']}" for row in rows if row["note"]]
    return [*failures, *dict.fromkeys(remarks)]


def target_table(assessed: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and cells; a roofline column only if used."""
    rows = [target_cells(target) for target in assessed]
    limit = TARGET_HEADER.index("at the roofline")
    if any(row[limit] for row in rows):
        return TARGET_HEADER, rows
    return TARGET_HEADER[:limit] + TARGET_HEADER[limit + 1 :], [row[:limit] + row[limit + 1 :] for row in rows]


def target_cells(target: dict[str, Any]) -> list[str]:
    sign = "≤ " if target["most"] else ""
    suffix = {"times": "×", "percent": "%", "microseconds": " µs"}[target["unit"]]

    def bound(value: float | None) -> str:
        return "" if value is None else f"{figure(value)}{suffix}"

    outcome = OUTCOMES.get(target["outcome"], target["outcome"])
    return [
        target["name"],
        sign + bound(target["at_least"]),
        sign + bound(target["aim"]),
        bound(target["measured"]),
        bound(target.get("at_limit")),
        outcome,
    ]


def limit_lines(result: dict[str, Any]) -> list[str]:
    before, used = result["limits"]["before"], result["limits"]["used"]
    if result["device"] == "cpu":
        how = "on registers" if before["multiply_add_method"] == "registers" else "in a matrix product"
        lanes = 16 * used["multiply_add"] / 1e9
        parts = [f"{lanes:.0f} G fp32 multiply-adds per second {how}, {before['threads']} threads"]
    else:
        parts = [f"{used['multiply_add'] / 1e12:.1f} T fp32 multiply-adds per second"] if "multiply_add" in used else []
    if "exponential" in used:
        parts.append(f"{used['exponential'] / 1e9:,.1f} G exponentials per second")
    parts.append(f"copies {used['copy'] / 1e9:,.1f} GB per second, read and written")
    return [f"measured peak rates: {'; '.join(parts)}"]


def memory_line(result: dict[str, Any]) -> str:
    memory = result["training_memory"]
    if "error" in memory:
        return f"training memory: not measured, {memory['error']}"
    sizes = f"{memory['time']:,} steps, {memory['channels']} channels"
    if memory["fraction"] is None:
        return f"training memory, {sizes}: autograd saves {100 * memory['saved_fraction']:.1f}% beyond inputs"
    return (
        f"training memory, {sizes}: {megabytes(memory['beyond_bytes'])} MiB beyond "
        f"{megabytes(memory['inputs_outputs_gradients_bytes'])} MiB of inputs, outputs and gradients, "
        f"{100 * memory['fraction']:.1f}% (of which saved states {100 * memory['saved_fraction']:.1f}%)"
    )


def verdict_line(result: dict[str, Any]) -> str:
    quiet = result["quiet"]
    return ("the machine was quiet: " if quiet["quiet"] else "NO VERDICT, the machine was busy: ") + quiet["reason"]


def very_long_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for entry in result.get("very_long", []):
        outcome = (
            entry.get("error") or f"{'correct' if entry['correct'] else 'WRONG'}, error {entry['worst_error']:.0e}"
        )
        time = f", {figure(entry['milliseconds'])} ms" if "milliseconds" in entry else ""
        lines.append(f"{entry['name']}: {outcome}{time}")
    return lines


def missing_line(result: dict[str, Any]) -> str:
    missing = result["missing_baselines"]
    return f"baselines not installed: {', '.join(missing)}" if missing else "all baselines were installed"


def show(result: dict[str, Any]) -> None:
    print(environment.summary(result["environment"]))
    for line in limit_lines(result):
        print(line)
    print("ratio: time per element over that of the first row; % of roofline: see scans/problems.py\n")
    for title, rows in group_rows(result).items():
        tables.show(title, HEADER, group_cells(rows))
        for note in notes(rows):
            print(f"  {note}")
        print()
    if assessed := targets.assess(result):
        tables.show("targets", *target_table(assessed))
        print()
    for line in (memory_line(result), *very_long_lines(result), missing_line(result), verdict_line(result)):
        print(line)
    print(f"{result['seconds']:.0f} s in all")


VECTORS = {"v4": "cpu", "v3": "cpu_avx2"}  # processors with AVX-512 and without, by instruction set


def machine_slug(result: dict[str, Any]) -> str:
    """Part of a result file's name: results of other vectors or another GPU are other files."""
    if result["device"] == "cpu":
        level = result["environment"]["wmkernels"]["cpu_isa"]
        return VECTORS.get(level, f"cpu_{level or 'portable'}")
    words = re.findall(r"[a-z0-9]+", result["environment"]["gpu"]["name"].lower())
    return next((w for w in words if re.fullmatch(r"[a-z]{1,3}\d{2,4}[a-z]?", w)), "_".join(words))

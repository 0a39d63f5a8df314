"""Tables in the terminal (rich, if installed) and Markdown."""

from collections.abc import Sequence

Cells = Sequence[str]


def show(title: str, header: Cells, rows: Sequence[Cells]) -> None:
    """Columns after the first are numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(title, header, rows))
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False, box=None)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    widths = [max(len(str(row[i])) for row in (header, *rows)) + 2 for i in range(len(header))]
    console = Console()
    if not console.is_terminal or console.width < sum(widths):
        console = Console(width=max(sum(widths) + 2, 80))
    console.print(table)


def plain(title: str, header: Cells, rows: Sequence[Cells]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Cells) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([title, line(header), *(line(row) for row in rows)])


def markdown(header: Cells, rows: Sequence[Cells]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def figure(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands separators; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1
    while magnitude < 1 and decimals < 6:
        magnitude *= 10
        decimals += 1
    while magnitude >= 10 and decimals > 0:
        magnitude /= 10
        decimals -= 1
    return f"{value:.{decimals}f}"


def megabytes(count: int | None) -> str:
    return "" if count is None else figure(count / 2**20)


def outcome(value: float | None, at_least: float | None, aim: float) -> str:
    """In words, of a target; ``at_least`` None: only the aim counts."""
    if value is None:
        return "not measured"
    if value >= aim:
        return "aim reached"
    if at_least is None:
        return "below the aim"
    return "reached" if value >= at_least else "missed"

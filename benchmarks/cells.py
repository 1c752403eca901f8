"""Formats the cells of tables, and tables in Markdown."""


def markdown(rows: list[dict[str, str]]) -> str:
    """Formats rows with the same columns as a table, without empty columns."""
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([c.ljust(width) for c, width in zip(line, widths)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def number(value: float | None, digits: int = 0, unit: float = 1) -> str:
    """Formats a number of a unit, or a dash if it is unknown."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


def ratio(found: dict | None) -> str:
    """Formats a ratio of means with its standard error, see `step_time.ratio`."""
    if found is None:
        return "-"
    error = found["standard_error"]
    spread = "" if error is None else f" ± {error:.3f}"
    return f"{found['of_means']:.3f}{spread}"

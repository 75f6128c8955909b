"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(head: Iterable[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """
    A markdown table.

    Args:
        head: the columns' names.
        rows: their cells, as many as `head` has.
        labels: how many columns from the left hold text; the others hold figures and are aligned to the right.

    Raises:
        ValueError: a row of another length.
    """
    head = list(head)
    lines = [_line(head), "|" + "---|" * labels + "---:|" * (len(head) - labels)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(row)} cells under {len(head)} columns: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"  # a bar ends a cell, in code, too

"""Tables of text, for a terminal or as Markdown."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in Markdown."""
    head, *body = (f"| {' | '.join(map(_cell, row))} |" for row in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *body])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

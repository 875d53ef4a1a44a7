"""What a benchmark writes: one comparison a row."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from apt_ray.files import write_json


class Row(TypedDict):
    """One comparison; `ratio` is how many times better ours is."""

    name: str
    ours: float
    baseline: float
    ratio: float
    unit: str


def compared(
    name: str, ours: float, baseline: float, unit: str, *, more_is_better: bool = False
) -> Row:
    """The row of two measurements, of which the smaller is the better one unless said."""
    ratio = ours / baseline if more_is_better else baseline / ours
    return Row(name=name, ours=ours, baseline=baseline, ratio=ratio, unit=unit)


def write_rows(rows: Sequence[Row], file: Path | None) -> None:
    """Print rows as a Markdown table and, if asked, write them as JSON."""
    print("| what | ours | baseline | ratio | unit |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['ours']:.4g} | {row['baseline']:.4g} | {row['ratio']:.2f}"
            f" | {row['unit']} |"
        )
    if file:
        write_json(file, rows)

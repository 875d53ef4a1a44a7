"""What a batch says at its end."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from apt_ray.tables import align
from serving.bulk.pipeline import Run
from serving.bulk.results import BINS, Tally, whole

_BARS = " ▁▂▃▄▅▆▇█"


def summary(tallies: Mapping[str, Tally], run: Run | None) -> dict[str, Any]:
    """For programs: the sums of all runs by category, and the work of this one."""
    return {
        "categories": {name: asdict(tally) for name, tally in sorted(tallies.items())},
        "run": None
        if run is None
        else {
            "images": run.images,
            "seconds": round(run.seconds, 2),
            "stages": {
                stage: {"seconds": round(seconds, 2), "busy": round(run.busy[stage], 3)}
                for stage, seconds in run.stage_s.items()
            },
            "slowest": run.slowest,
            "lost": len(run.lost),
        },
    }


def closing_lines(tallies: Mapping[str, Tally], run: Run | None) -> list[str]:
    """For people: a row a category, over all runs, and where the time of this one went."""
    rows: list[tuple[str, ...]] = [
        ("category", "images", "rejected", "unreadable", f"scores 0 {' ' * (BINS - 4)} 1")
    ]
    rows += [_row(name, tally) for name, tally in sorted(tallies.items())]
    if len(tallies) > 1:
        rows.append(_row("all", whole(tallies)))
    lines = align(rows).splitlines()
    if run is not None:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in run.busy.items())
        lines += [
            "",
            f"{run.images:,} images in {run.seconds:.0f} s,"
            f" {run.images / max(run.seconds, 1e-9):.1f}/s; busy: {shares}."
            f" The slowest stage is {run.slowest}.",
        ]
    return lines


def _row(name: str, tally: Tally) -> tuple[str, ...]:
    judged = max(1, tally.images - tally.unreadable)
    return (
        name,
        f"{tally.images:,}",
        f"{tally.rejected:,} ({tally.rejected / judged:.1%})",
        f"{tally.unreadable:,}",
        f"[{_bars(tally.scores)}]",
    )


def _bars(scores: list[int]) -> str:
    """One letter a bin, none of them empty that holds a score."""
    most = max(1, *scores)
    return "".join(_BARS[-(-score * (len(_BARS) - 1) // most)] for score in scores)

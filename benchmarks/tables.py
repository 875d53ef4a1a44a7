"""The tables of `benchmarks.accuracy` and `benchmarks.peers`, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from apt_ray.validation.evaluation import FIGURES, mean_of_known, percent
from apt_ray.validation.intervals import METRICS, Interval, change_over_seeds
from benchmarks.ledger import Key, Ledger, Row

OURS, OURS_ALONE = "apt", "apt-alone"

PUBLISHED = {
    "mvtec": (
        ("WinCLIP+", {1: (93.1, 95.2)}),
        ("PromptAD", {1: (94.6, 95.9), 4: (96.6, None)}),
        ("AnomalyDINO-S", {1: (96.6, 96.8), 4: (97.7, None)}),
        ("SubspaceAD", {1: (97.1, 97.5), 4: (98.0, None)}),
        ("UniVAD", {1: (97.8, None)}),
        ("VisionAD", {1: (97.4, None)}),
    ),
    "visa": (
        ("WinCLIP+", {1: (83.8, None)}),
        ("PromptAD", {1: (86.9, None), 4: (89.1, None)}),
        ("AnomalyDINO-S", {1: (87.4, None), 4: (92.6, None)}),
        ("SubspaceAD", {1: (93.3, None), 4: (94.7, None)}),
        ("UniVAD", {1: (93.5, None)}),
        ("VisionAD", {1: (94.8, None)}),
    ),
}
"""Data set -> method -> shots -> image AUROC and pixel AUROC in percent, as their papers state
them; each has its own backbone and resolution."""


def format_rows(ledger: Ledger, *, published: str | None = None) -> str:
    """Method by category: mean and standard deviation over the seeds, then over the categories.

    Where the rows have a peak of memory the highest of them is shown.
    """
    rows = list(ledger.rows.values())
    has_peak = any(row.peak_mb is not None for row in rows)
    lines = [
        "| shots | category | method | image AUROC | pixel AUROC | AUPRO | good rejected |"
        " defects found | s per fit | ms per image |" + " peak MB |" * has_peak,
        "|---|---|---|---|---|---|---|---|---|---|" + "---|" * has_peak,
    ]
    for shots in sorted({row.shots for row in rows}):
        chosen = [row for row in rows if row.shots == shots]
        categories = _distinct(row.category for row in chosen)
        for category in categories:
            lines += [
                _line(shots, category, method, [[row] for row in group], has_peak)
                for method, group in _by_method(r for r in chosen if r.category == category)
            ]
        if len(categories) > 1:
            lines += [
                _line(shots, "**mean**", method, _by_seed(group), has_peak)
                for method, group in _by_method(chosen)
            ]
        for name, figures in PUBLISHED[published] if published else ():
            if shots in figures:
                image, pixel = figures[shots]
                lines.append(
                    f"| {shots} | **published** | {name} | {image} | {pixel or '-'} | - | - |"
                    " - | - | - |" + " - |" * has_peak
                )
    return "\n".join(lines)


def format_claims(ledger: Ledger) -> str:
    """APT against every other method, the hardest first: what may be claimed, and what not."""
    lines = [
        "| shots | APT | against | metric | theirs | APT | difference (95 % interval) | APT is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = _distinct(key.method for key in ledger.rows)
    for shots in sorted({key.shots for key in ledger.rows}):
        for ours in (OURS, OURS_ALONE):
            alone = ours == OURS_ALONE
            others = [
                method
                for method in methods
                if not method.startswith("apt")
                and (method.endswith("-alone") or method == "winclip-zero") == alone
            ]
            for metric in METRICS:
                claims = [
                    (other, interval)
                    for other in others
                    if (interval := _compare(ledger, other, ours, shots, metric)) is not None
                ]
                claims.sort(key=lambda claim: claim[1].after - claim[1].before)
                lines += [
                    f"| {shots} | {ours} | {other} | {metric.replace('_auroc', ' AUROC')} |"
                    f" {100 * i.before:.1f} | {100 * i.after:.1f} |"
                    f" {100 * (i.after - i.before):+.1f} ({100 * i.low:+.1f} to"
                    f" {100 * i.high:+.1f}) | {i.verdict} |"
                    for other, i in claims
                ]
    return "\n".join(lines)


def _compare(ledger: Ledger, before: str, after: str, shots: int, metric: str) -> Interval | None:
    """Over all categories and seeds that both methods have; None if there are none."""
    values: dict[str, tuple[list[object], list[object]]] = {}
    for key, metrics in ledger.resamples.items():
        twin = Key(after, key.category, shots, key.seed)
        if key.method != before or key.shots != shots or metric not in metrics:
            continue
        if metric in ledger.resamples.get(twin, {}):
            pair = values.setdefault(key.category, ([], []))
            pair[0].append(metrics[metric])
            pair[1].append(ledger.resamples[twin][metric])
    if not values:
        return None
    return change_over_seeds(*zip(*values.values(), strict=True))


def _line(
    shots: int, category: str, method: str, groups: Sequence[Sequence[Row]], has_peak: bool
) -> str:
    """A line whose figures are the mean and deviation over groups of rows."""
    cells = " | ".join(
        percent([mean_of_known([getattr(row, figure) for row in group]) for group in groups])
        for figure in FIGURES
    )
    rows = [row for group in groups for row in group]
    peaks = [row.peak_mb for row in rows if row.peak_mb is not None]
    peak = f" {max(peaks):.0f} |" if peaks else " - |"
    return (
        f"| {shots} | {category} | {method} | {cells} |"
        f" {fmean(row.fit_seconds for row in rows):.1f} |"
        f" {fmean(row.image_ms for row in rows):.1f} |" + peak * has_peak
    )


def _by_method(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return list(groups.items())


def _by_seed(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.seed, []).append(row)
    return list(groups.values())


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))

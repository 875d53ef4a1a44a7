"""Curves and histograms as SVG, to be put into a page.

I test images, H histogram bins.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from apt_ray.validation.evaluation import Result
from apt_ray.validation.intervals import ImageScores
from apt_ray.validation.metrics import counts_above, precision_recall_curve, roc_curve

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]

COLOURS = {"prompts": "#3b6fb6", "reference": "#d9822b", "both": "#2a8c4a"}
_GOOD, _DEFECTIVE = "#7a8794", "#b3261e"
_BINS = 30

# Text stays text, in the fonts of the page.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "apt-ray",
    "font.family": "sans-serif",
}


def draw_roc(results: Sequence[Result]) -> str:
    """ROC curves over images, every seed of every way of scoring."""
    return _draw_curves(
        results,
        _image_roc,
        title="ROC over images",
        axes=("false alarms", "defects found"),
        figure=lambda result: result.image_auroc,
        name="AUROC",
    )


def draw_precision_recall(results: Sequence[Result]) -> str:
    """Precision-recall curves over images."""
    return _draw_curves(
        results,
        _image_precision_recall,
        title="Precision and recall over images",
        axes=("recall: defects found", "precision: alarms that are right"),
        figure=None,
        name="",
    )


def draw_pixel_roc(results: Sequence[Result]) -> str:
    """ROC curves over pixels."""
    return _draw_curves(
        results,
        _pixel_roc,
        title="ROC over pixels",
        axes=("false alarms", "defect pixels found"),
        figure=lambda result: result.pixel_auroc,
        name="AUROC",
    )


def draw_pixel_precision_recall(results: Sequence[Result]) -> str:
    """Precision-recall curves over pixels."""
    return _draw_curves(
        results,
        _pixel_precision_recall,
        title="Precision and recall over pixels",
        axes=("recall: defect pixels found", "precision: alarms that are right"),
        figure=None,
        name="",
    )


def draw_scores(result: Result) -> str:
    """Histogram of the anomaly scores of good and defective images, with the threshold."""
    scores = result.scores

    def draw(axes: Axes) -> None:
        low, high = float(scores.score_I.min()), float(scores.score_I.max())
        edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1).tolist()
        for name, colour, chosen in (
            ("good", _GOOD, ~scores.is_anomalous_I),
            ("defective", _DEFECTIVE, scores.is_anomalous_I),
        ):
            label = f"{name} ({int(chosen.sum())})"
            axes.hist(scores.score_I[chosen], edges, color=colour, alpha=0.6, label=label)
        if result.threshold is not None:
            value = result.threshold.value
            axes.axvline(value, color="black", linestyle="--", label=f"threshold {value:.3f}")
        axes.set(
            title=f"Anomaly scores, {result.variant}, seed {result.seed}",
            xlabel="anomaly score",
            ylabel="images",
        )
        axes.locator_params(axis="y", integer=True)
        axes.legend(frameon=False, fontsize=8)

    return svg(draw)


def _draw_curves(
    results: Sequence[Result],
    curve: Callable[[ImageScores], Curve],
    *,
    title: str,
    axes: tuple[str, str],
    figure: Callable[[Result], float | None] | None,
    name: str,
) -> str:
    def draw(canvas: Axes) -> None:
        for variant, colour in COLOURS.items():
            group = [result for result in results if result.variant == variant]
            label = variant
            values = [figure(result) for result in group] if figure else []
            known = [value for value in values if value is not None]
            if known:
                label = f"{variant}, {name} {100 * fmean(known):.1f}"
            for place, result in enumerate(group):
                x, y = curve(result.scores)
                canvas.plot(
                    x,
                    y,
                    color=colour,
                    alpha=0.85 if place == 0 else 0.35,
                    linewidth=1.4,
                    label=label if place == 0 else None,
                )
        canvas.set(
            title=title,
            xlabel=axes[0],
            ylabel=axes[1],
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.03),
        )
        canvas.legend(frameon=False, fontsize=8)

    return svg(draw)


def _image_roc(scores: ImageScores) -> Curve:
    return roc_curve(*counts_above(scores.score_I, scores.is_anomalous_I))


def _image_precision_recall(scores: ImageScores) -> Curve:
    return precision_recall_curve(*counts_above(scores.score_I, scores.is_anomalous_I))


def _pixel_roc(scores: ImageScores) -> Curve:
    return roc_curve(*_pixels_above(scores))


def _pixel_precision_recall(scores: ImageScores) -> Curve:
    return precision_recall_curve(*_pixels_above(scores))


def _pixels_above(scores: ImageScores) -> tuple[Floats, Floats]:
    """Normal and anomalous pixels above each threshold, `(H,)`, the highest threshold first."""
    assert scores.normal_IH is not None
    assert scores.anomalous_IH is not None
    normal_H, anomalous_H = (
        counts_IH.sum(0, dtype=np.float64)[::-1].cumsum()
        for counts_IH in (scores.normal_IH, scores.anomalous_IH)
    )
    # Bins in which nothing lies would only make the page larger.
    moves_H = np.diff(normal_H + anomalous_H, prepend=0) > 0
    return normal_H[moves_H], anomalous_H[moves_H]


def svg(draw: Callable[[Axes], None], *, size: tuple[float, float] = (4.4, 3.3)) -> str:
    """What `draw` puts into axes, as the text of an SVG element; `size` is in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]

"""Plots of a category's trials."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tuning.records import TrialRecord
from tuning.results import Importance
from tuning.space import Axis, Space

_COLOURS = "viridis"
_COLUMNS = 4
_VALUE = "validation value (AUROC)"


def draw_plots(
    trials: Sequence[TrialRecord],
    winner: TrialRecord,
    space: Space,
    importances: Mapping[str, Importance],
) -> dict[str, Image.Image]:
    """Name -> plot of all trials that have reported."""
    reported = [trial for trial in trials if trial.validation]
    plots = {
        "trials": _plot(1, lambda axes: _draw_steps(axes[0], reported, winner)),
        "value_over_time": _plot(1, lambda axes: _draw_time(axes[0], reported)),
        "slices": _plot(
            len(space), lambda axes: _draw_slices(axes, reported, winner, space, importances)
        ),
        "parallel_coordinates": _plot(
            1, lambda axes: _draw_parallel(axes[0], reported, winner, space)
        ),
    }
    if importances:
        plots["importances"] = _plot(1, lambda axes: _draw_importances(axes[0], importances))
    return plots


def _plot(parts: int, draw: Callable[[list[Axes]], None]) -> Image.Image:
    columns = min(parts, _COLUMNS)
    rows = math.ceil(parts / columns)
    size = (max(7.6, 3.0 * columns), 3.6 * rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[parts:]:
        axes.remove()
    draw(all_axes[:parts])
    return render(figure)


def render(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _draw_steps(axes: Axes, trials: Sequence[TrialRecord], winner: TrialRecord) -> None:
    """Value against steps, a line a trial; the winner with its standard deviation."""
    for trial in trials:
        if trial is not winner:
            axes.plot(trial.steps, trial.validation, color="0.65", linewidth=1, marker=".")
    axes.errorbar(
        winner.steps,
        winner.validation,
        yerr=winner.validation_sd,
        color="tab:blue",
        linewidth=2,
        capsize=3,
        marker="o",
        label=f"trial {winner.number}, chosen",
    )
    axes.set(xlabel="steps", ylabel=_VALUE)
    axes.legend(loc="lower right")


def _draw_time(axes: Axes, trials: Sequence[TrialRecord]) -> None:
    """Every trial's last value when it was reported, and the best one up to then."""
    ended = sorted((trial.seconds[-1], trial.validation[-1], len(trial.steps)) for trial in trials)
    furthest = max(rungs for _, _, rungs in ended)
    whole = [(seconds, value) for seconds, value, rungs in ended if rungs == furthest]
    axes.scatter(
        [seconds for seconds, _, _ in ended],
        [value for _, value, _ in ended],
        c=["tab:blue" if rungs == furthest else "0.75" for _, _, rungs in ended],
        s=18,
        label="a trial (gray: stopped early)",
    )
    best = np.maximum.accumulate([value for _, value in whole])
    axes.step([seconds for seconds, _ in whole], best, where="post", label="best so far")
    axes.set(xlabel="seconds since the start", ylabel=_VALUE)
    axes.legend(loc="lower right")


def _draw_slices(
    all_axes: Sequence[Axes],
    trials: Sequence[TrialRecord],
    winner: TrialRecord,
    space: Space,
    importances: Mapping[str, Importance],
) -> None:
    """Value against each searched setting, coloured by the order of drawing."""
    for axes, (name, axis) in zip(all_axes, space.items(), strict=True):
        x = [_number(trial.settings[name], axis) for trial in trials]
        y = [trial.validation[-1] for trial in trials]
        axes.scatter(x, y, c=[trial.number for trial in trials], cmap=_COLOURS, s=18)
        axes.scatter(
            _number(winner.settings[name], axis),
            winner.validation[-1],
            facecolors="none",
            edgecolors="tab:red",
            s=90,
        )
        if axis.log:
            axes.set_xscale("log")
        if axis.choices is not None and not _is_numeric(axis):
            axes.set_xticks(range(len(axis.choices)), [str(choice) for choice in axis.choices])
        share = f" ({importances[name].share:.0%})" if name in importances else ""
        axes.set_xlabel(name + share)
    for axes in all_axes[::_COLUMNS]:
        axes.set_ylabel(_VALUE)


def _draw_parallel(
    axes: Axes, trials: Sequence[TrialRecord], winner: TrialRecord, space: Space
) -> None:
    """One line a trial through its settings and its value, each brought to 0..1."""
    names = [*space, "validation"]
    columns = []
    for name, axis in space.items():
        column = np.array([_number(trial.settings[name], axis) for trial in trials], dtype=float)
        columns.append(np.log(column) if axis.log else column)
    columns.append(np.array([trial.validation[-1] for trial in trials]))
    table = np.stack([_to_unit(column) for column in columns], 1)
    colours = colormaps[_COLOURS](table[:, -1])
    for trial, row, colour in zip(trials, table, colours, strict=True):
        is_winner = trial is winner
        axes.plot(row, color="tab:red" if is_winner else colour, linewidth=2.5 if is_winner else 1)
    for place, name in enumerate(names):
        values = [
            trial.validation[-1] if name == "validation" else trial.settings[name]
            for trial in trials
        ]
        numbers = [value for value in values if isinstance(value, int | float)]
        if numbers:
            axes.text(place, -0.02, f"{min(numbers):.3g}", ha="center", va="top", fontsize=8)
            axes.text(place, 1.02, f"{max(numbers):.3g}", ha="center", va="bottom", fontsize=8)
        axes.axvline(place, color="0.8", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set_ylim(-0.12, 1.12)


def _draw_importances(axes: Axes, importances: Mapping[str, Importance]) -> None:
    names = list(importances)[::-1]
    shares = [importances[name] for name in names]
    axes.barh(
        names,
        [one.share for one in shares],
        xerr=(
            [max(0.0, one.share - one.low) for one in shares],
            [max(0.0, one.high - one.share) for one in shares],
        ),
        color=["tab:blue" if one.is_seen else "0.75" for one in shares],
        capsize=3,
    )
    axes.set_title("gray: no difference seen", fontsize=9)
    axes.set(xlabel="share in the variance of the value (fANOVA)", xlim=(0, 1))


def _is_numeric(axis: Axis) -> bool:
    return all(isinstance(c, int | float) and not isinstance(c, bool) for c in axis.choices or ())


def _number(value: Any, axis: Axis) -> float:
    if axis.choices is not None and not _is_numeric(axis):
        return float(axis.choices.index(value))
    return float(value)


def _to_unit(
    values: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low) if high > low else np.full_like(values, 0.5)

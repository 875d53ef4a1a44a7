"""Scores kept image by image: figures by defect type, and paired intervals between two runs.

Pixel figures come from histograms of the map values on a logit scale, fine enough that their AUROC
differs from the exact one by less than a thousandth.

I test images, H histogram bins, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from apt_ray.auroc import auroc_of_counts
from apt_ray.errors import DataError
from apt_ray.files import writing
from apt_ray.tables import markdown
from apt_ray.text import printable
from apt_ray.validation.metrics import image_auroc

METRICS = ("image_auroc", "pixel_auroc")
"""The metrics that can be resampled."""

_BINS = 2048
_LIMIT = 14.0

Floats = NDArray[np.float64]
Counts = NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScores:
    """What one fit, scored in one way, says of every test image.

    Attributes:
        names: the test images, relative to their category.
        defect_types: "good" for normal ones.
        score_I: anomaly scores in 0..1.
        is_anomalous_I: the truth.
        normal_IH, anomalous_IH: histograms of the map over normal and anomalous pixels, None where
            there are no masks.
    """

    variant: str
    category: str
    seed: int
    names: tuple[str, ...]
    defect_types: tuple[str, ...]
    score_I: Floats
    is_anomalous_I: NDArray[np.bool_]
    normal_IH: Counts | None
    anomalous_IH: Counts | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeFigures:
    """One defect type against all normal images; AUROC in 0..1."""

    variant: str
    category: str
    seed: int
    defect_type: str
    images: int
    image_auroc: float
    pixel_auroc: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """After minus before, averaged over the seeds; the 95 % interval is over test images."""

    variant: str
    category: str
    metric: str
    before: float
    after: float
    low: float
    high: float


def histogram(map_HW: NDArray[np.float32], where_HW: NDArray[np.bool_]) -> Counts:
    """(H,) counts of the map's values (0..1) at the chosen pixels, over equal bins of the logit."""
    with np.errstate(divide="ignore"):
        place = (logit(map_HW[where_HW]) + _LIMIT) * (_BINS / (2 * _LIMIT))
    index = np.clip(place, 0, _BINS - 1).astype(np.int64)
    return np.bincount(index, minlength=_BINS).astype(np.uint32)


def by_defect_type(scores: ImageScores) -> list[TypeFigures]:
    """The figures of every defect type, in the order of their names."""
    types = np.array(scores.defect_types)
    figures = []
    for name in sorted(set(types[scores.is_anomalous_I])):
        kept = ~scores.is_anomalous_I | (types == name)
        pixel = None
        if scores.normal_IH is not None and scores.anomalous_IH is not None:
            weight_1I = kept[None].astype(np.float64)
            pixel = float(_pixel_aurocs(scores, weight_1I)[0])
        figures.append(
            TypeFigures(
                variant=scores.variant,
                category=scores.category,
                seed=scores.seed,
                defect_type=str(name),
                images=int((types == name).sum()),
                image_auroc=image_auroc(scores.score_I[kept], scores.is_anomalous_I[kept]),
                pixel_auroc=pixel,
            )
        )
    return figures


def compare(
    before: Sequence[ImageScores],
    after: Sequence[ImageScores],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Difference]:
    """Paired bootstrap over the test images, good and defective ones drawn separately.

    Both runs and all seeds are scored on the same resamples; a percentile interval of 95 %.

    Raises:
        DataError: the runs have no category, seed and variant in common, or other test images.
    """
    groups: dict[tuple[str, str], list[tuple[ImageScores, ImageScores]]] = {}
    earlier = {(s.category, s.variant, s.seed): s for s in before}
    for scores in after:
        twin = earlier.get((scores.category, scores.variant, scores.seed))
        if twin is not None:
            groups.setdefault((scores.category, scores.variant), []).append((twin, scores))
    if not groups:
        raise DataError(
            "the two files have no category, variant and seed in common: evaluate both with the"
            " same --categories, --shots and --seeds"
        )
    differences = []
    for (category, variant), pairs in groups.items():
        first = pairs[0][0]
        for scores in (scores for pair in pairs for scores in pair):
            if scores.names != first.names or scores.defect_types != first.defect_types:
                odd = sorted(set(scores.names) ^ set(first.names))
                example = f", such as {printable(odd[0])}" if odd else ""
                raise DataError(
                    f"{category}: the files were made from other test images, or other labels of"
                    f" them ({len(odd)} are not in both{example}): evaluate both on one folder,"
                    f" whose support images lie apart from its test images"
                )
        value_SX = [
            [resample(scores, resamples=resamples, seed=seed) for scores in pair] for pair in pairs
        ]
        for metric in METRICS:
            if not all(metric in values for pair in value_SX for values in pair):
                continue
            value_SR2 = np.array(
                [[values[metric] for values in pair] for pair in value_SX]
            ).swapaxes(1, 2)
            mean_R2 = value_SR2.mean(0)
            # The first row of weights is the whole test set.
            change_R = mean_R2[1:, 1] - mean_R2[1:, 0]
            low, high = np.quantile(change_R, (0.025, 0.975))
            differences.append(
                Difference(
                    variant=variant,
                    category=category,
                    metric=metric,
                    before=float(mean_R2[0, 0]),
                    after=float(mean_R2[0, 1]),
                    low=float(low),
                    high=float(high),
                )
            )
    return differences


def in_one_only(before: Sequence[ImageScores], after: Sequence[ImageScores]) -> list[str]:
    """What `compare` passes over because one of the two lacks it, in words."""
    earlier, later = (
        {
            f"{one.category}, {one.variant}, seed {one.seed}, {metric.replace('_auroc', ' AUROC')}"
            for one in scores
            for metric in METRICS
            if metric == "image_auroc" or one.normal_IH is not None
        }
        for scores in (before, after)
    )
    return [
        *(f"{lacking}: only before" for lacking in sorted(earlier - later)),
        *(f"{lacking}: only after" for lacking in sorted(later - earlier)),
    ]


def resample(scores: ImageScores, *, resamples: int = 1000, seed: int = 0) -> dict[str, Floats]:
    """Metric -> its value `(1 + R,)` on the whole test set, then on R resamples of its images.

    Good and defective images are drawn separately. Scores of the same test images and `seed` meet
    the same resamples, so their differences are paired. Pixel AUROC is left out without masks.
    """
    weight_RI = draw_weights(scores.is_anomalous_I, resamples=resamples, seed=seed)
    values = {"image_auroc": image_aurocs(scores.score_I, scores.is_anomalous_I, weight_RI)}
    if scores.normal_IH is not None:
        values["pixel_auroc"] = _pixel_aurocs(scores, weight_RI)
    return values


def draw_weights(strata_I: NDArray[Any], *, resamples: int = 1000, seed: int = 0) -> Floats:
    """(1 + R, I): how often each image is drawn, those of each stratum from among themselves; the
    first row draws every image once."""
    rng = np.random.default_rng(seed)
    weight_RI = np.ones((1 + resamples, len(strata_I)))
    for stratum in np.unique(strata_I):
        members = np.flatnonzero(strata_I == stratum)
        even = np.full(len(members), 1 / len(members))
        weight_RI[1:, members] = rng.multinomial(len(members), even, size=resamples)
    return weight_RI


def image_aurocs(score_I: Floats, is_anomalous_I: NDArray[np.bool_], weight_RI: Floats) -> Floats:
    """Image AUROC `(1 + R,)` on each of the resamples of `draw_weights`."""
    # Every distinct score is a bin of its own.
    levels, place_I = np.unique(score_I, return_inverse=True)
    one_hot_IH = np.zeros((len(place_I), len(levels)))
    one_hot_IH[np.arange(len(place_I)), place_I] = 1
    is_anomalous_I1 = is_anomalous_I[:, None]
    return auroc_of_counts(
        weight_RI @ (one_hot_IH * ~is_anomalous_I1), weight_RI @ (one_hot_IH * is_anomalous_I1)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean change with its 95 % interval; all in 0..1."""

    before: float
    after: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What may be claimed: "better", "worse" or "no difference shown"."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def change_over_seeds(
    before: Sequence[Sequence[Floats]], after: Sequence[Sequence[Floats]], *, seed: int = 0
) -> Interval:
    """The change of a metric's mean over categories, paired bootstrap over images and seeds.

    Both arguments hold, for each category and each of its seeds, the values `(1 + R,)` of
    `resample`, in the same order. In each resample the images are those drawn there, and the seeds
    are drawn anew for every category.
    """
    rng = np.random.default_rng(seed)
    change_R = np.zeros(len(before[0][0]) - 1)
    means = np.zeros(2)
    for category_before, category_after in zip(before, after, strict=True):
        value_2SR = np.array([category_before, category_after])
        means += value_2SR[:, :, 0].mean(1) / len(before)
        seeds, resamples = value_2SR.shape[1], len(change_R)
        drawn_SR = rng.integers(seeds, size=(seeds, resamples))
        change_SR = np.take_along_axis(value_2SR[1, :, 1:] - value_2SR[0, :, 1:], drawn_SR, 0)
        change_R += change_SR.mean(0) / len(before)
    low, high = np.quantile(change_R, (0.025, 0.975))
    return Interval(before=float(means[0]), after=float(means[1]), low=float(low), high=float(high))


def save_scores(path: Path, scores: Sequence[ImageScores]) -> None:
    """Write them as one compressed `.npz` without pickled objects; WriteError if that fails."""
    arrays = {}
    for number, one in enumerate(scores):
        arrays[f"{number}/key"] = np.array([one.variant, one.category, str(one.seed)])
        arrays[f"{number}/names"] = np.array(one.names)
        arrays[f"{number}/defect_types"] = np.array(one.defect_types)
        arrays[f"{number}/score_I"] = one.score_I
        arrays[f"{number}/is_anomalous_I"] = one.is_anomalous_I
        if one.normal_IH is not None and one.anomalous_IH is not None:
            arrays[f"{number}/normal_IH"] = one.normal_IH
            arrays[f"{number}/anomalous_IH"] = one.anomalous_IH
    with writing(path) as place, place.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_scores(path: Path) -> list[ImageScores]:
    """Read what `save_scores` wrote; DataError if it is something else."""
    try:
        # Opened here: numpy leaves a damaged one open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        count = len({name.split("/")[0] for name in arrays})
        return [_unpack(arrays, str(number)) for number in range(count)]
    except (OSError, KeyError, ValueError, BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} holds no scores ({error}): write it with `apt-ray evaluate --scores {path}`"
        ) from error


def format_types(scores: Sequence[ImageScores]) -> str:
    """Image and pixel AUROC by defect type as a Markdown table, percent, mean over the seeds."""
    groups: dict[tuple[str, str, str], list[TypeFigures]] = {}
    for one in scores:
        for figures in by_defect_type(one):
            key = (figures.category, figures.defect_type, figures.variant)
            groups.setdefault(key, []).append(figures)
    rows = []
    for (category, name, variant), group in groups.items():
        pixel = [figures.pixel_auroc for figures in group if figures.pixel_auroc is not None]
        rows.append(
            (
                category,
                name,
                str(group[0].images),
                variant,
                f"{100 * fmean(figures.image_auroc for figures in group):.1f}",
                f"{100 * fmean(pixel):.1f}" if pixel else "-",
            )
        )
    header = ("category", "defect type", "images", "variant", "image AUROC", "pixel AUROC")
    return markdown(header, rows)


def format_differences(differences: Sequence[Difference]) -> str:
    """The differences as a Markdown table, in percentage points."""
    header = ("category", "variant", "metric", "before", "after", "difference (95 % interval)")
    rows = [
        (
            d.category,
            d.variant,
            d.metric.replace("_auroc", " AUROC"),
            f"{100 * d.before:.1f}",
            f"{100 * d.after:.1f}",
            f"{100 * (d.after - d.before):+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
        )
        for d in differences
    ]
    return markdown(header, rows)


def _pixel_aurocs(scores: ImageScores, weight_RI: Floats) -> Floats:
    assert scores.normal_IH is not None
    assert scores.anomalous_IH is not None
    return auroc_of_counts(weight_RI @ scores.normal_IH, weight_RI @ scores.anomalous_IH)


def _unpack(arrays: dict[str, NDArray[np.generic]], number: str) -> ImageScores:
    variant, category, seed = arrays[f"{number}/key"].tolist()
    return ImageScores(
        variant=variant,
        category=category,
        seed=int(seed),
        names=tuple(arrays[f"{number}/names"].tolist()),
        defect_types=tuple(arrays[f"{number}/defect_types"].tolist()),
        score_I=arrays[f"{number}/score_I"].astype(np.float64),
        is_anomalous_I=arrays[f"{number}/is_anomalous_I"].astype(np.bool_),
        normal_IH=_counts(arrays.get(f"{number}/normal_IH")),
        anomalous_IH=_counts(arrays.get(f"{number}/anomalous_IH")),
    )


def _counts(array: NDArray[np.generic] | None) -> Counts | None:
    return None if array is None else array.astype(np.uint32)

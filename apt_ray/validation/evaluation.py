"""Evaluation on labelled test images: fit on the support set, report, never choose.

Every test image is encoded once; all seeds and variants score the same features. Maps and masks of
the images' size are made one at a time, as often as they are needed, and never kept: an evaluation
takes the same memory whatever the size of the images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from apt_ray.config import FitSettings
from apt_ray.data.distinct import Copies, Distinct, pixel_digest
from apt_ray.data.folders import GOOD, Category
from apt_ray.detection.calibration import Threshold
from apt_ray.detection.detector import Detector
from apt_ray.detection.kinds import Kinds, look
from apt_ray.detection.rule import resize_map
from apt_ray.errors import DataError, SettingsError
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.files import Location
from apt_ray.images import find_reading, read_image, read_mask
from apt_ray.levels import UNTOLD, Reading
from apt_ray.prompts.confirm import confirm
from apt_ray.prompts.fit import fit
from apt_ray.tables import markdown
from apt_ray.text import printable
from apt_ray.validation.examples import Example, choose
from apt_ray.validation.intervals import ImageScores, histogram
from apt_ray.validation.metrics import image_auroc, pixel_auroc_and_aupro
from apt_ray.validation.naming import Named
from apt_ray.validation.verdicts import Verdicts

METRICS = ("image_auroc", "pixel_auroc", "aupro")
FIGURES = (*METRICS, "good_rejected", "defects_found")
HEADER = (
    "category",
    "shots",
    "variant",
    "image AUROC",
    "pixel AUROC",
    "AUPRO",
    "good rejected",
    "defects found",
)
"""Of the rows that `summarise` gives."""

_BATCH = 16
_MOST_OF_THE_IMAGE = 0.5

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One fit, scored in one way. Metrics are in 0..1, None where the data do not define them.

    Attributes:
        copies: normal images that were left out, since they show what another one shows.
        threshold: of the prompt set, None for a way of scoring that it does not belong to.
        examples: telling test images, where they were asked for.
        named: what its defects were called, where some were confirmed.
    """

    variant: str
    category: str
    shots: int
    seed: int
    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    copies: Copies = ()
    scores: ImageScores = field(repr=False, compare=False)
    threshold: Threshold | None = field(default=None, repr=False, compare=False)
    examples: tuple[Example, ...] = field(default=(), repr=False, compare=False)
    named: Named | None = field(default=None, repr=False, compare=False)

    @property
    def verdicts(self) -> Verdicts | None:
        """What the threshold makes of the test images; None without one."""
        return None if self.threshold is None else Verdicts.of(self.scores, self.threshold)

    @property
    def good_rejected(self) -> float | None:
        """The share of the normal test images that is rejected, in 0..1; None without threshold."""
        return None if self.verdicts is None else self.verdicts.good.share

    @property
    def defects_found(self) -> float | None:
        """The share of the anomalous test images that is rejected, in 0..1; None without
        threshold."""
        return None if self.verdicts is None else self.verdicts.defects.share

    def as_dict(self) -> dict[str, object]:
        """The figures, with 95 % intervals of the shares, and the threshold; the scores of single
        images are kept by `intervals.save_scores`."""
        verdicts, threshold = self.verdicts, self.threshold
        return {
            **{f.name: getattr(self, f.name) for f in fields(self) if f.compare},
            "good_rejected": self.good_rejected,
            "good_rejected_interval": verdicts and verdicts.good.interval,
            "defects_found": self.defects_found,
            "defects_found_interval": verdicts and verdicts.defects.interval,
            "defects_found_by_type": verdicts
            and {printable(name): rejected.share for name, rejected in verdicts.by_type.items()},
            "threshold": threshold and threshold.model_dump(),
            "kinds_named_right": self.named and self.named.balanced_accuracy,
        }


def evaluate(
    category: Category,
    *,
    backbone: Backbone,
    shots: int,
    seeds: Sequence[int],
    settings: FitSettings | None = None,
    calibration: int = 0,
    confirmed: int = 0,
    examples: int = 0,
    progress: Progress | None = None,
) -> list[Result]:
    """Fit one prompt set a seed and report it on the category's test images.

    Each is scored three ways: `prompts` only, `reference` only, and `both`, weighted as in
    `settings`. Pixel metrics are None unless every anomalous test image has a mask; the shares that
    are rejected are those of `both`, to which the threshold belongs.

    Args:
        calibration: how many normal images outside the support set each threshold is set from;
            they are not tested. Without them the support set gives an uncertified one.
        confirmed: how many defective images of each type teach the kinds of defects; they are not
            tested.
        examples: how many test images of each kind to show with the first seed's `both`.
        progress: called with (what is being done, done, in all).

    Raises:
        DataError: too few images, no test images of one kind, a broken file, a mask of another
            size.
        SettingsError: no seeds, or one that is given twice or out of range.
    """
    settings = settings or FitSettings()
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"got the seeds {list(seeds)}: give at least one, and none twice")
    fits = {seed: FitSettings.parse({**settings.model_dump(), "seed": seed}) for seed in seeds}
    report = progress or (lambda _what, _done, _total: None)
    draws = {seed: category.draw(shots, seed, calibration=calibration) for seed in seeds}
    defects = {seed: category.draw_defects(confirmed, seed) for seed in seeds}
    # Test images are encoded once for all seeds, so all are read by what all support images say.
    reading = find_reading(
        list(dict.fromkeys(path for drawn in draws.values() for path in drawn.support)),
        ground=settings.ground,
        white_level=settings.white_level,
    )
    test = TestSet.read(category, reading)
    features = test.encode(backbone, report)
    results = []
    for seed, drawn in draws.items():
        prompt_set = fit(
            category.name,
            drawn.support,
            fits[seed],
            backbone=backbone,
            calibration=drawn.calibration,
            reading=reading,
            progress=lambda done, total, seed=seed: report(f"fit seed {seed}", done, total),  # type: ignore[misc]
        )
        if defects[seed]:
            prompt_set = confirm(prompt_set, defects[seed], backbone).prompt_set
        detector = Detector(backbone, prompt_set)
        for variant, weight in (
            ("prompts", 0.0),
            ("reference", 1.0),
            ("both", settings.reference_weight),
        ):

            def score(
                index: list[int], detector: Detector = detector, weight: float = weight
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return detector.score(features[index].to(backbone.device), reference_weight=weight)

            threshold = prompt_set.threshold if variant == "both" else None
            result = test.result(
                score,
                variant=variant,
                support=drawn.support,
                calibration=(*drawn.calibration, *(defect.path for defect in defects[seed])),
                seed=seed,
                threshold=threshold,
            )
            result = replace(result, copies=tuple(dict.fromkeys((*drawn.copies, *result.copies))))
            if threshold is not None and seed == seeds[0]:
                shown = test.examples(score, result, threshold.value, examples)
                result = replace(result, examples=shown)
            if variant == "both" and prompt_set.kinds is not None:
                named = test.name(score, features, result, prompt_set.kinds, confirmed)
                result = replace(result, named=named)
            results.append(result)
    return results


Scorer = Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]
"""Places in a test set -> anomaly maps `(B, size, size)` in 0..1 and anomaly scores `(B,)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSet:
    """The test images of a category and what is true of them.

    Attributes:
        category: whose they are; `category.test` lists them.
        reading: how their files are read.
        sizes: (width, height) of each.
        digests: of their pixels, by file.
        masks: ground truth of each, bool (H, W), unpacked when it is asked for; None unless every
            anomalous one has a mask.
    """

    __test__ = False

    category: Category
    reading: Reading
    sizes: tuple[tuple[int, int], ...]
    digests: Mapping[Location, str]
    masks: Sequence[npt.NDArray[np.bool_]] | None

    @classmethod
    def read(cls, category: Category, reading: Reading = UNTOLD) -> TestSet:
        """Read sizes and masks; DataError if there are no test images of one kind."""
        if len({image.is_anomalous for image in category.test}) < 2:
            raise DataError(
                f"category {category.name} in {category.root} needs good and defective test images"
                f" to be evaluated: add the missing kind"
            )
        sizes: list[tuple[int, int]] = []
        digests: dict[Location, str] = {}
        for tested in category.test:
            image = read_image(tested.path, reading)
            sizes.append(image.size)
            digests[tested.path] = pixel_digest(image)
        masks = _read_masks(category, sizes) if category.has_masks else None
        return cls(
            category=category,
            reading=reading,
            sizes=tuple(sizes),
            digests=digests,
            masks=masks,
        )

    def held_out(self, used: Collection[Location]) -> tuple[list[int], Copies]:
        """The places of the images that are not among the used; of normal ones neither those that
        show what one of these shows, nor copies of one another, which are named."""
        distinct = Distinct()
        for path in used:
            digest = self.digests.get(path) or pixel_digest(read_image(path, self.reading))
            distinct.admit(path, digest)
        kept = [
            place
            for place, image in enumerate(self.category.test)
            if image.path not in used
            and (image.is_anomalous or distinct.admit(image.path, self.digests[image.path]))
        ]
        return kept, distinct.copies

    def encode(self, backbone: Backbone, progress: Progress) -> ImageFeatures:
        """Features of all of them, in order, on the CPU."""
        parts = []
        images = self.category.test
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            pixels = [
                backbone.preprocess([read_image(image.path, self.reading)]) for image in batch
            ]
            features = backbone.encode_images(torch.cat(pixels))
            parts.append(features.to(torch.device("cpu")))
            progress("encode test images", start + len(batch), len(images))
        return ImageFeatures.concatenate(parts)

    def result(
        self,
        score: Scorer,
        *,
        variant: str,
        support: Collection[Location],
        calibration: Collection[Location] = (),
        seed: int,
        threshold: Threshold | None = None,
    ) -> Result:
        """Score what is held out from the support and the calibration set, and measure."""
        kept, copies = self.held_out({*support, *calibration})
        small_SS: list[torch.Tensor] = []
        scores: list[float] = []
        for start in range(0, len(kept), _BATCH):
            maps_BSS, scores_B = score(kept[start : start + _BATCH])
            small_SS += maps_BSS.cpu()
            scores += scores_B.tolist()
        images = [self.category.test[i] for i in kept]
        is_anomalous = np.array([image.is_anomalous for image in images])
        pixel, overlap, histograms_2IH = None, None, None
        if (known := self.masks) is not None:
            maps = _Made(len(kept), lambda k: resize_map(small_SS[k], self.sizes[kept[k]]).numpy())
            masks = _Made(len(kept), lambda k: known[kept[k]])
            pixel, overlap = pixel_auroc_and_aupro(maps, masks)
            histograms_2IH = np.stack(
                [
                    [histogram(map_HW, ~mask_HW), histogram(map_HW, mask_HW)]
                    for map_HW, mask_HW in zip(maps, masks, strict=True)
                ],
                axis=1,
            )
        return Result(
            variant=variant,
            category=self.category.name,
            shots=len(support),
            seed=seed,
            image_auroc=image_auroc(scores, is_anomalous),
            pixel_auroc=pixel,
            aupro=overlap,
            copies=copies,
            scores=ImageScores(
                variant=variant,
                category=self.category.name,
                seed=seed,
                names=tuple(self.category.name_of(image.path) for image in images),
                defect_types=tuple(image.defect_type for image in images),
                score_I=np.asarray(scores, dtype=np.float64),
                is_anomalous_I=is_anomalous,
                normal_IH=None if histograms_2IH is None else histograms_2IH[0],
                anomalous_IH=None if histograms_2IH is None else histograms_2IH[1],
            ),
            threshold=threshold,
        )

    def name(
        self,
        score: Scorer,
        features: ImageFeatures,
        result: Result,
        kinds: Kinds,
        examples: int,
    ) -> Named:
        """What the defective images of a result are called, rejected or not."""
        place = {self.category.name_of(image.path): i for i, image in enumerate(self.category.test)}
        scores = result.scores
        pairs = []
        for name, kind in zip(scores.names, scores.defect_types, strict=True):
            if kind != GOOD:
                index = [place[name]]
                maps_1SS, _ = score(index)
                (said,) = kinds.probabilities(look(features[index], maps_1SS.cpu()))
                pairs.append((kind, max(said, key=said.__getitem__)))
        return Named(
            category=result.category, seed=result.seed, examples=examples, pairs=tuple(pairs)
        )

    def examples(
        self, score: Scorer, result: Result, threshold: float, count: int
    ) -> tuple[Example, ...]:
        """`count` test images of each kind, as `examples.choose` picks them, with their maps."""
        place = {self.category.name_of(image.path): i for i, image in enumerate(self.category.test)}
        index = [place[name] for name in result.scores.names]
        shown = []
        for kind, chosen in choose(
            result.scores.score_I, result.scores.is_anomalous_I, threshold, count
        ):
            maps_1SS, scores_1 = score([index[chosen]])
            i = index[chosen]
            shown.append(
                Example(
                    kind=kind,
                    image=self.category.test[i],
                    score=float(scores_1[0]),
                    map_SS=maps_1SS[0].cpu(),
                    reading=self.reading,
                )
            )
        return tuple(shown)


def format_table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    return markdown(HEADER, summarise(results))


def summarise(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Rows under `HEADER`: percent, mean and standard deviation over the seeds; behind those of
    several categories, of the means over those that define the figure."""
    groups: dict[tuple[str, int, str], list[Result]] = {}
    means: dict[tuple[int, str], dict[int, list[Result]]] = {}
    for result in results:
        groups.setdefault((result.category, result.shots, result.variant), []).append(result)
        by_seed = means.setdefault((result.shots, result.variant), {})
        by_seed.setdefault(result.seed, []).append(result)
    rows = [
        (category, str(shots), variant, *_cells([[result] for result in group]))
        for (category, shots, variant), group in groups.items()
    ]
    for (shots, variant), by_seed in means.items():
        count = len({result.category for group in by_seed.values() for result in group})
        if count > 1:
            rows.append((f"mean of {count}", str(shots), variant, *_cells(by_seed.values())))
    return rows


def _cells(groups: Collection[Sequence[Result]]) -> Iterator[str]:
    """Each figure in percent: mean and deviation over groups of results."""
    for figure in FIGURES:
        yield percent([mean_of_known([getattr(one, figure) for one in group]) for group in groups])


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are defined, None if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def percent(values: Sequence[float | None]) -> str:
    """Mean and standard deviation in percent, for a table; "-" where nothing is defined."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"


class _Made(Sequence[Any]):
    """So many items, each made anew whenever it is asked for."""

    def __init__(self, count: int, make: Callable[[int], npt.NDArray[Any]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return self._make(range(self._count)[place])


def _read_masks(
    category: Category, sizes: Sequence[tuple[int, int]]
) -> Sequence[npt.NDArray[np.bool_]]:
    covered: list[float] = []

    def pack(place: Location, size: tuple[int, int]) -> bytes:
        mask_HW = read_mask(place, size)
        covered.append(float(mask_HW.mean()))
        return zlib.compress(np.packbits(mask_HW).tobytes(), level=1)

    packed = [
        None if image.mask is None or not image.is_anomalous else pack(image.mask, size)
        for image, size in zip(category.test, sizes, strict=True)
    ]
    if covered and min(covered) > _MOST_OF_THE_IMAGE:
        first = next(image.mask for image in category.test if image.is_anomalous)
        raise DataError(
            f"every mask of {category.name}, such as {first}, marks more than half of its image:"
            f" invert them, so that the defect is white on black, or take them away"
        )

    def mask(place: int) -> npt.NDArray[np.bool_]:
        width, height = sizes[place]
        content = packed[place]
        if content is None:
            return np.zeros((height, width), dtype=bool)
        bits = np.frombuffer(zlib.decompress(content), dtype=np.uint8)
        return np.unpackbits(bits, count=width * height).reshape(height, width).astype(bool)

    return _Made(len(sizes), mask)

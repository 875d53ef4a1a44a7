"""Evaluation on labelled test images: fit on the support set, report, never choose.

Every test image is encoded once; all seeds and variants score the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from apt_ray.backbone import FrozenCLIP, ImageFeatures
from apt_ray.comparison import ImageScores, histogram
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, LabelledImage
from apt_ray.detector import Detector
from apt_ray.errors import DataError
from apt_ray.fitting import fit
from apt_ray.images import read_image, read_mask
from apt_ray.metrics import aupro, image_auroc, pixel_auroc
from apt_ray.scoring import resize_map

METRICS = ("image_auroc", "pixel_auroc", "aupro")

_BATCH = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One fit, scored in one way. Metrics are in 0..1, None where the data do not define them."""

    variant: str
    category: str
    shots: int
    seed: int
    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    scores: ImageScores = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, object]:
        """The figures; the scores of single images are kept by `comparison.save_scores`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}


def evaluate(
    category: Category,
    *,
    backbone: FrozenCLIP,
    shots: int,
    seeds: Sequence[int],
    settings: FitSettings | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Fit one prompt set a seed and report it on the category's test images.

    Each is scored three ways: `prompts` only, `reference` only, and `both`, weighted as in
    `settings`. Pixel metrics are None unless every anomalous test image has a mask.

    Args:
        progress: called with (what is being done, done, in all).

    Raises:
        DataError: too few images, no test images of one kind, a broken file, a mask of another
        size.
    """
    settings = settings or FitSettings()
    if len({image.is_anomalous for image in category.test}) < 2:
        raise DataError(
            f"category {category.name} in {category.root} needs good and defective test images to"
            f" be evaluated: add the missing kind"
        )
    supports = {seed: category.support_set(shots, seed) for seed in seeds}
    report = progress or (lambda _what, _done, _total: None)
    features, sizes = _encode(category, backbone, report)
    masks = _read_masks(category, sizes) if category.has_masks else None
    results = []
    for seed, support in supports.items():
        prompt_set = fit(
            category.name,
            support,
            settings.model_copy(update={"seed": seed}),
            backbone=backbone,
            progress=lambda done, total, seed=seed: report(f"fit seed {seed}", done, total),  # type: ignore[misc]
        )
        detector = Detector(backbone, prompt_set)
        kept = [i for i, image in enumerate(category.test) if image.path not in support]
        for variant, weight in (
            ("prompts", 0.0),
            ("reference", 1.0),
            ("both", settings.reference_weight),
        ):
            maps, scores = _score(
                detector,
                features[kept],
                [sizes[i] for i in kept] if masks else [],
                weight,
            )
            results.append(
                _result(
                    variant,
                    category,
                    shots,
                    seed,
                    [category.test[i] for i in kept],
                    scores,
                    maps,
                    [masks[i] for i in kept] if masks else None,
                )
            )
    return results


def format_table(results: Sequence[Result]) -> str:
    """The results as a Markdown table: percent, mean and standard deviation over the seeds."""
    lines = [
        "| category | shots | variant | image AUROC | pixel AUROC | AUPRO |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.category, result.shots, result.variant), []).append(result)
    for (category, shots, variant), group in groups.items():
        cells = " | ".join(
            _cell([getattr(result, metric) for result in group]) for metric in METRICS
        )
        lines.append(f"| {category} | {shots} | {variant} | {cells} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"


def _encode(
    category: Category, backbone: FrozenCLIP, report: Progress
) -> tuple[ImageFeatures, list[tuple[int, int]]]:
    parts, sizes = [], []
    for start in range(0, len(category.test), _BATCH):
        images = [read_image(image.path) for image in category.test[start : start + _BATCH]]
        sizes += [image.size for image in images]
        parts.append(backbone.encode_images(backbone.preprocess(images)))
        report("encode test images", len(sizes), len(category.test))
    return ImageFeatures.concatenate(parts), sizes


def _read_masks(
    category: Category, sizes: Sequence[tuple[int, int]]
) -> list[npt.NDArray[np.bool_]]:
    return [
        np.zeros((size[1], size[0]), dtype=bool)
        if image.mask is None or not image.is_anomalous
        else read_mask(image.mask, size)
        for image, size in zip(category.test, sizes, strict=True)
    ]


def _score(
    detector: Detector,
    features: ImageFeatures,
    sizes: Sequence[tuple[int, int]],
    reference_weight: float,
) -> tuple[list[npt.NDArray[np.float32]], list[float]]:
    """Anomaly maps at the images' sizes (none without sizes), and anomaly scores."""
    maps, scores = [], []
    for start in range(0, len(features), _BATCH):
        stop = min(start + _BATCH, len(features))
        maps_BHW, scores_B = detector.score(features[start:stop], reference_weight=reference_weight)
        scores += scores_B.tolist()
        maps += [
            resize_map(map_HW, size).numpy()
            for map_HW, size in zip(maps_BHW.cpu(), sizes[start:stop], strict=False)
        ]
    return maps, scores


def _result(
    variant: str,
    category: Category,
    shots: int,
    seed: int,
    images: Sequence[LabelledImage],
    scores: Sequence[float],
    maps: Sequence[npt.NDArray[np.float32]],
    masks: Sequence[npt.NDArray[np.bool_]] | None,
) -> Result:
    is_anomalous = np.array([image.is_anomalous for image in images])
    pixels = list(zip(maps, masks, strict=True)) if masks else []
    return Result(
        variant=variant,
        category=category.name,
        shots=shots,
        seed=seed,
        image_auroc=image_auroc(scores, is_anomalous),
        pixel_auroc=pixel_auroc(maps, masks) if masks else None,
        aupro=aupro(maps, masks) if masks else None,
        scores=ImageScores(
            variant=variant,
            category=category.name,
            seed=seed,
            names=tuple(image.path.relative_to(category.root).as_posix() for image in images),
            defect_types=tuple(image.defect_type for image in images),
            score_I=np.asarray(scores, dtype=np.float64),
            is_anomalous_I=is_anomalous,
            normal_IH=np.stack([histogram(m, ~mask) for m, mask in pixels]) if pixels else None,
            anomalous_IH=np.stack([histogram(m, mask) for m, mask in pixels]) if pixels else None,
        ),
    )

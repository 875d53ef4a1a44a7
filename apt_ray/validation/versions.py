"""Two prompt sets on the same perturbed images: is one better, by more than chance?

The bank is made from normal images that neither was fitted to, by the perturbation families that
no prompt learns from. Both see the very same pixels and are scored as they serve.

S seeds, F families, B images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.anomalies.families import SELECTION
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import load_backbone
from apt_ray.features.pixels import to_image, to_pixels
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.validation.metrics import AnyArray, image_auroc, pixel_auroc

SEEDS = 4
"""How often each image is perturbed by each family."""

MIN_STANDARD_ERRORS = 2.0
MAX_FAMILY_LOSS = 0.02

Progress = Callable[[int, int], None]
_FIRST_SEED = 1_000
"""Apart from the seeds of support sets, fits and trials."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VersionComparison:
    """Validation values of a candidate and a champion, AUROC in 0..1.

    Attributes:
        families: names of the F families.
        candidate_SF, champion_SF: the values, float64.
        images: how many normal images the bank was made from.
    """

    families: tuple[str, ...]
    candidate_SF: npt.NDArray[np.float64]
    champion_SF: npt.NDArray[np.float64]
    images: int

    @property
    def difference(self) -> float:
        """Mean over seeds and families of candidate minus champion."""
        return float((self.candidate_SF - self.champion_SF).mean())

    @property
    def standard_error(self) -> float:
        """Of the difference, over its S x F pairs.

        Pairs of one seed or one family are alike, so it is clustered by both (Cameron, Gelbach and
        Miller 2011, Robust inference with multiway clustering), and never below that of independent
        pairs.
        """
        paired_SF = self.candidate_SF - self.champion_SF
        residual_SF = paired_SF - paired_SF.mean()

        def variance(sums: npt.NDArray[np.float64]) -> float:
            unbiased = len(sums) / (len(sums) - 1)
            return float(unbiased * (sums**2).sum() / residual_SF.size**2)

        independent = variance(residual_SF.ravel())
        clustered = variance(residual_SF.sum(0)) + variance(residual_SF.sum(1)) - independent
        return sqrt(max(clustered, independent))

    @property
    def worst_family(self) -> tuple[str, float]:
        """The family where the candidate gains least, and what it gains there."""
        gains = (self.candidate_SF - self.champion_SF).mean(0)
        place = int(gains.argmin())
        return self.families[place], float(gains[place])

    @property
    def verdict(self) -> Literal["promoted", "kept"]:
        """Promoted if better by more than 2 standard errors and by no family 2 points worse."""
        better = self.difference > MIN_STANDARD_ERRORS * self.standard_error
        return "promoted" if better and self.worst_family[1] >= -MAX_FAMILY_LOSS else "kept"


def compare_prompt_sets(
    candidate: PromptSet,
    champion: PromptSet,
    images: Sequence[Image.Image],
    *,
    backbone: Backbone | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> VersionComparison:
    """`compare_detectors` of two prompt sets of one category, on the backbones that they name.

    Args:
        images: normal RGB images that neither was fitted to; at least one.
        backbone: one that is loaded already; used where it is the one that is needed.
        device: where others are loaded.
        progress: called with (families judged, families in all).

    Raises:
        BackboneError: a backbone that a prompt set names cannot be loaded.
    """
    loaded = {} if backbone is None else {backbone.fingerprint: backbone}
    for prompt_set in (candidate, champion):
        if prompt_set.fingerprint not in loaded:
            loaded[prompt_set.fingerprint] = load_backbone(prompt_set.backbone, device=device)
    ours, theirs = (Detector(loaded[one.fingerprint], one) for one in (candidate, champion))
    return compare_detectors(ours, theirs, images, progress=progress)


def compare_detectors(
    candidate: Detector,
    champion: Detector,
    images: Sequence[Image.Image],
    *,
    progress: Progress | None = None,
) -> VersionComparison:
    """Judge two detectors of one category on `images`, which neither was fitted to.

    The value of a detector for a seed and a family is the mean of the AUROC over pixels and that
    over images, perturbed against clean.

    Args:
        images: normal RGB images; at least one.
        progress: called with (families judged, families in all).
    """
    detectors = (candidate, champion)
    size = max(detector.backbone.input_size for detector in detectors)
    squares = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    pixels_B3HW = to_pixels(squares, size)
    clean = [scores_B for _, scores_B in _score(detectors, squares, size)]
    values = np.empty((len(detectors), SEEDS, len(SELECTION)))
    for seed in range(SEEDS):
        g = torch.Generator().manual_seed(_FIRST_SEED + seed)
        for place, family in enumerate(SELECTION.values()):
            perturbed_B3HW, changed_BHW = family(pixels_B3HW, g)
            perturbed = [to_image(perturbed_3HW) for perturbed_3HW in perturbed_B3HW]
            for which, (maps_BHW, scores_B) in enumerate(_score(detectors, perturbed, size)):
                values[which, seed, place] = fmean(
                    [
                        _pixel_auroc(maps_BHW.numpy(), changed_BHW.numpy()),
                        image_auroc(
                            [*scores_B.tolist(), *clean[which].tolist()],
                            [True] * len(scores_B) + [False] * len(clean[which]),
                        ),
                    ]
                )
            if progress is not None:
                progress(seed * len(SELECTION) + place + 1, SEEDS * len(SELECTION))
    return VersionComparison(
        families=tuple(SELECTION),
        candidate_SF=values[0],
        champion_SF=values[1],
        images=len(images),
    )


def _score(
    detectors: Sequence[Detector], images: Sequence[Image.Image], size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Maps `(B, size, size)` and scores `(B,)` by each detector; equal backbones encode once."""
    features: dict[str, ImageFeatures] = {}
    results = []
    for detector in detectors:
        backbone = detector.backbone
        if backbone.fingerprint not in features:
            encoded = backbone.encode_in_batches(backbone.preprocess(images))
            features[backbone.fingerprint] = encoded
        maps_BHW, scores_B = detector.score(features[backbone.fingerprint])
        maps_B1HW = F.interpolate(maps_BHW.cpu()[:, None], size=(size, size), mode="bilinear")
        results.append((maps_B1HW[:, 0], scores_B.cpu()))
    return results


def _pixel_auroc(maps_BHW: AnyArray, changed_BHW: AnyArray) -> float:
    """Over all images; one half where nothing changed that could be found."""
    if changed_BHW.all() or not changed_BHW.any():
        return 0.5
    return pixel_auroc(list(maps_BHW), list(changed_BHW))

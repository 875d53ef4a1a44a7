"""Confirmed defects teach a prompt set the kinds of defects that there are.

What is learned stands beside what scores: no score and no verdict depends on it.

X examples, D the widths of all reference layers together, H, W pixels of an image, S of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from apt_ray.data.distinct import pixel_digest
from apt_ray.data.folders import Defect, kind_problem
from apt_ray.detection.detector import Detector
from apt_ray.detection.kinds import Kinds, is_same, look
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import DataError
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import cover, read_image, read_mask
from apt_ray.levels import FORMER, Reading
from apt_ray.text import printable

_FAINTEST = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """What confirming defects did.

    Attributes:
        prompt_set: the new one; its scores and threshold are those of the old one.
        scores: anomaly scores of the images.
        named: the kind that each would be given by all other examples; None if there is no other.
    """

    prompt_set: PromptSet
    scores: tuple[float, ...]
    named: tuple[str | None, ...]


def confirm(prompt_set: PromptSet, defects: Sequence[Defect], backbone: Backbone) -> Confirmation:
    """Let images of confirmed defects say what each kind of defect looks like.

    Where a mask or boxes say where the defect is, what is most anomalous there counts, else what is
    most anomalous in the image.

    Args:
        prompt_set: which learns; it stays as it is.
        defects: each of a kind.
        backbone: the prompt set's own.

    Raises:
        DataError: a defect is of no kind, an image or mask cannot be read, or a box lies outside.
        PromptSetError: the backbone is another.
    """
    detector = Detector(backbone, prompt_set)
    known = prompt_set.kinds.examples if prompt_set.kinds else []
    scores: list[float] = []
    learned: list[tuple[str, torch.Tensor]] = []
    images = read_defects(defects, prompt_set.reading)
    for defect, image in zip(defects, images, strict=True):
        features = backbone.encode_images(backbone.preprocess([image]))
        score, look_D = look_at(detector, features, defect, image.size)
        scores.append(score)
        learned.append((defect.kind, look_D))
    kinds = Kinds.of([*known, *learned])
    return Confirmation(
        prompt_set=prompt_set.with_kinds(kinds),
        scores=tuple(scores),
        named=tuple(_named(kinds, look_D) for _, look_D in learned),
    )


def read_defects(defects: Sequence[Defect], reading: Reading = FORMER) -> list[Image.Image]:
    """Their images, if `confirm` would take them.

    Raises DataError or ImageError for an image that cannot be read, is of no kind, of two, or of
    one that `kind_problem` refuses, and for a mask or box that is not its own.
    """
    kinds: dict[str, Defect] = {}
    images = []
    for defect in defects:
        if not defect.kind:
            raise DataError(
                f"{defect.path} is of no kind: move it into a folder that is named like its kind of"
                f" defect"
            )
        if problem := kind_problem(defect.kind):
            raise DataError(
                f"the kind of {printable(defect.path)} cannot have that name: {problem}"
            )
        image = read_image(defect.path, reading)
        _where(defect, image.size)
        known = kinds.setdefault(pixel_digest(image), defect)
        if known.kind != defect.kind:
            raise DataError(
                f"{known.path} and {defect.path} are one image of two kinds, {known.kind} and"
                f" {defect.kind}: take one away"
            )
        images.append(image)
    return images


def look_at(
    detector: Detector, features: ImageFeatures, defect: Defect, size: tuple[int, int]
) -> tuple[float, torch.Tensor]:
    """The anomaly score of a defect's image, and `(D,)` of `look` at the defect.

    Args:
        features: of the one image.
        size: its (width, height).

    Raises:
        DataError: the mask cannot be read, or a box lies outside.
    """
    score, map_SS = map_of(detector, features, defect, size)
    return score, look(features, map_SS[None])[0].cpu()


def map_of(
    detector: Detector, features: ImageFeatures, defect: Defect, size: tuple[int, int]
) -> tuple[float, torch.Tensor]:
    """The anomaly score of a defect's image, and its map `(S, S)`, 0 where somebody said that the
    defect is not; arguments and errors are those of `look_at`."""
    maps_1SS, scores_1 = detector.score(features)
    where_HW = _where(defect, size)
    if where_HW is not None:
        rows, columns = maps_1SS.shape[1:]
        inside_SS = torch.from_numpy(cover(where_HW, (rows, columns))).to(maps_1SS.device)
        # A defect that the map does not see is still nowhere else.
        maps_1SS = (maps_1SS + _FAINTEST) * inside_SS
    return float(scores_1), maps_1SS[0]


def _where(defect: Defect, size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """(H, W) of an image of `size` = (width, height): what mask and boxes mark; None without."""
    width, height = size
    marked_HW = np.zeros((height, width), np.bool_)
    if defect.mask is not None:
        marked_HW |= read_mask(defect.mask, size)
    for x, y, wide, high in defect.boxes:
        if min(x, y) < 0 or min(wide, high) < 1 or x + wide > width or y + high > height:
            raise DataError(
                f"the box {x},{y},{wide},{high} does not lie in {defect.path}, which has {width} x"
                f" {height} pixels: correct it, or take it away"
            )
        marked_HW[y : y + high, x : x + wide] = True
    return marked_HW if marked_HW.any() else None


def _named(kinds: Kinds, look_D: torch.Tensor) -> str | None:
    """The kind that all other examples say."""
    others = [example for example in kinds.examples if not is_same(example[1], look_D)]
    if not others:
        return None
    (said,) = Kinds.of(others).probabilities(look_D[None])
    return max(said, key=said.__getitem__)

"""Images of what a prompt set sees, shown under its version in the registry.

Pixels are (3, H, W) float32 in 0..1 where they are tensors.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageOps

from apt_ray.anomalies.families import SELECTION
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.pixels import to_image
from apt_ray.features.protocol import Backbone
from apt_ray.images import draw_overlay
from apt_ray.text import printable

_SIDE = 190
_GAP = 4
_CAPTION = 16
_COLUMNS = 4
_MOST_IMAGES = 12


def draw_support(
    backbone: Backbone, prompt_set: PromptSet, images: Sequence[Image.Image]
) -> Image.Image:
    """The support images above their overlays, captioned with their anomaly scores."""
    return draw_sheet(
        backbone, prompt_set, {f"support {i}": image for i, image in enumerate(images)}
    )


def draw_perturbed(backbone: Backbone, prompt_set: PromptSet, image: Image.Image) -> Image.Image:
    """One image under each perturbation family that judges trials, above the overlays.

    The perturbations are those that selection judges by, of a kind that training never saw; the
    image itself is of the support set.
    """
    pixels = backbone.preprocess([image]).cpu()
    generator = torch.Generator().manual_seed(prompt_set.settings.seed)
    perturbed = {
        name: to_image(family(pixels, generator).pixels_B3HW[0])
        for name, family in SELECTION.items()
    }
    return draw_sheet(backbone, prompt_set, perturbed)


def draw_sheet(
    backbone: Backbone, prompt_set: PromptSet, images: Mapping[str, Image.Image]
) -> Image.Image:
    """Rows of captioned images, each above its overlay."""
    shown = dict(list(images.items())[:_MOST_IMAGES])
    inspections = Detector(backbone, prompt_set).inspect(list(shown.values()))
    rows = math.ceil(len(shown) / _COLUMNS)
    row_height = _CAPTION + 2 * (_SIDE + _GAP)
    width = min(len(shown), _COLUMNS) * (_SIDE + _GAP)
    sheet = Image.new("RGB", (width, rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, ((name, image), inspection) in enumerate(
        zip(shown.items(), inspections, strict=True)
    ):
        left = place % _COLUMNS * (_SIDE + _GAP)
        top = place // _COLUMNS * row_height
        caption = f"{printable(name)}, score {inspection.anomaly_score:.3f}"
        draw.text((left, top + 2), caption, fill="black")
        overlay = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
        for line, picture in enumerate((image, overlay)):
            small = ImageOps.contain(picture, (_SIDE, _SIDE))
            sheet.paste(small, (left, top + _CAPTION + line * (_SIDE + _GAP)))
    return sheet

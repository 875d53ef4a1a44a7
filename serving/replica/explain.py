"""What a verdict rests on: maps of the two kinds of evidence, and the nearest support patches.

Support images are looked at from the small copies in the prompt set, which are encoded when
somebody asks; those of a few categories are kept.

S pixels a side of a map; H, W pixels of the image; N support images, M places, D their width.
"""

import asyncio
import base64
import math
from collections import OrderedDict
from concurrent.futures import Executor
from dataclasses import asdict, dataclass

import torch
from PIL import Image

from apt_ray.anomalies.families import ABOUT
from apt_ray.detection.detector import Detector, Region
from apt_ray.detection.nearest import NearestPlace, nearest_places
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import decode_image, encode_jpeg
from apt_ray.validation.resemblance import Kinds, departure, draw_kinds, join
from serving.api.messages import (
    CategoryReport,
    ExplainedRegion,
    Explanation,
    NearestPatch,
    ResemblanceReport,
)
from serving.replica.beside import Beside
from serving.replica.pictures import small_map_png
from serving.replica.served import ServedCategory

_MOST_REGIONS = 5
_PICTURE_SIDE = 256
# What is shown around a region, as a share of its box on each side, and the least that is shown.
_AROUND = 0.5
_LEAST = 0.08
_KEPT = 4
_MOST_IMAGES = 4
_MOST_KINDS = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Look:
    """An image as the detector sees it.

    Attributes:
        features: of the one image.
        map_SS, prompts_SS, memory_SS: the anomaly map, and those of each kind of evidence alone.
        score: the anomaly score.
    """

    features: ImageFeatures
    map_SS: torch.Tensor
    prompts_SS: torch.Tensor
    memory_SS: torch.Tensor
    score: float

    @classmethod
    @torch.inference_mode()
    def at(cls, detector: Detector, image: Image.Image) -> "Look":
        backbone = detector.backbone
        features = backbone.encode_images(backbone.preprocess([image]))
        maps_1SS, scores_1 = detector.score(features)
        prompts_1SS, _ = detector.score(features, reference_weight=0.0)
        memory_1SS, _ = detector.score(features, reference_weight=1.0)
        return cls(
            features=features.to(torch.device("cpu")),
            map_SS=maps_1SS[0].cpu(),
            prompts_SS=prompts_1SS[0].cpu(),
            memory_SS=memory_1SS[0].cpu(),
            score=float(scores_1),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Support:
    """The support images of a version, from their small copies.

    Attributes:
        layers: reference layer -> `(N, M, D)` of them, float16.
        kinds: anomalies that were drawn on the first few.
    """

    images: tuple[Image.Image, ...]
    layers: dict[int, torch.Tensor]
    kinds: Kinds


class Supports:
    """The support images that were looked at last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], Support] = OrderedDict()
        self._making = asyncio.Lock()

    async def of(
        self, served: ServedCategory, beside: Beside | None, model: Executor
    ) -> Support | None:
        """Those of a version; None if its prompt set holds no copies of them.

        Raises AptError or ProblemError if nobody has its file any more.
        """
        key = (served.about.category, served.about.version)
        if beside is None:
            return None
        if key not in self._kept:
            async with self._making:  # or all who ask at once encode as often
                if key not in self._kept:
                    stored = await beside.stored(*key)
                    found = await _look_at(stored.data, served.detector.backbone, model)
                    if found is None:
                        return None
                    self._kept[key] = found
                    while len(self._kept) > _KEPT:
                        self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


async def _look_at(data: bytes, backbone: Backbone, model: Executor) -> Support | None:
    """The support images of a prompt set's file; None if it holds no copies of them."""
    thumbnails = (await asyncio.to_thread(PromptSet.from_bytes, data)).thumbnails
    if not thumbnails:
        return None
    images = await asyncio.to_thread(lambda: tuple(map(decode_image, thumbnails)))
    loop = asyncio.get_running_loop()
    layers = await loop.run_in_executor(model, _encode, backbone, images)
    kinds = []
    steps = draw_kinds(backbone, images[:_MOST_IMAGES], layers, draws=1, seed=0)
    # One step after another, so that inspections that wait for the model come between.
    while (some := await loop.run_in_executor(model, next, steps, None)) is not None:
        kinds.append(some)
    return Support(images=images, layers=layers, kinds=join(kinds))


@torch.inference_mode()
def _encode(backbone: Backbone, images: tuple[Image.Image, ...]) -> dict[int, torch.Tensor]:
    features = backbone.encode_in_batches(backbone.preprocess(images))
    return {layer: tokens.half().cpu() for layer, tokens in features.layers.items()}


def explanation(
    about: CategoryReport,
    detector: Detector,
    image: Image.Image,
    look: Look,
    support: Support | None,
) -> Explanation:
    """What is told of an image that was looked at."""
    found = detector.conclude(look.map_SS, look.score, image.size, map_size=(1, 1))
    regions = found.regions[:_MOST_REGIONS]
    provenance = detector.prompt_set.provenance
    points = [_worst_point(look.map_SS, region, image.size) for region in regions]
    nearest: list[NearestPlace | None] = [None] * len(regions)
    if support is not None:
        nearest[:] = nearest_places(look.features, support.layers, provenance.scales, points)
    return Explanation(
        category=about.category,
        version=about.version,
        anomaly_score=look.score,
        threshold=found.threshold,
        is_anomalous=found.is_anomalous,
        width=image.width,
        height=image.height,
        regions=[
            ExplainedRegion(
                **asdict(region),
                picture_jpeg=_jpeg(image.crop(_box(region, image.size))),
                nearest=_patch(region, place, image.size, support, provenance.support_names)
                if support and place
                else None,
                resembles=_resembles(look, point, support, place) if support and place else [],
            )
            for region, point, place in zip(regions, points, nearest, strict=True)
        ],
        prompts_map_png=_base64(small_map_png(look.prompts_SS, image.size)),
        memory_map_png=_base64(small_map_png(look.memory_SS, image.size)),
        note=""
        if support
        else f"version {about.version} of {about.category} holds no copies of its support images:"
        " fit and register the category again to see the nearest ones",
    )


def _worst_point(
    map_SS: torch.Tensor, region: Region, size: tuple[int, int]
) -> tuple[float, float]:
    """Where the map is highest in a region: (x, y), shares of the image."""
    side = len(map_SS)
    width, height = size
    left, top = (
        int(start * side / whole) for start, whole in ((region.x, width), (region.y, height))
    )
    right = max(left + 1, math.ceil((region.x + region.width) * side / width))
    bottom = max(top + 1, math.ceil((region.y + region.height) * side / height))
    inside = map_SS[top:bottom, left:right]
    row, column = divmod(int(inside.argmax()), inside.shape[1])
    return (left + column + 0.5) / side, (top + row + 0.5) / side


def _extent(region: Region, size: tuple[int, int]) -> tuple[float, float]:
    """How much of an image is shown of a region: (width, height), shares of the image."""
    shares = (region.width / size[0], region.height / size[1])
    wide, high = (min(1.0, max(_LEAST, share * (1 + 2 * _AROUND))) for share in shares)
    return wide, high


def _box(region: Region, size: tuple[int, int]) -> tuple[int, int, int, int]:
    middle = (
        (region.x + region.width / 2) / size[0],
        (region.y + region.height / 2) / size[1],
    )
    return _around(middle, _extent(region, size), size)


def _around(
    middle: tuple[float, float], extent: tuple[float, float], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in pixels around a middle, moved into the image."""
    starts: list[int] = []
    ends: list[int] = []
    for centre, share, pixels in zip(middle, extent, size, strict=True):
        length = min(pixels, max(1, round(share * pixels)))
        start = min(max(0, round(centre * pixels - length / 2)), pixels - length)
        starts.append(start)
        ends.append(start + length)
    return starts[0], starts[1], ends[0], ends[1]


def _patch(
    region: Region,
    place: NearestPlace,
    size: tuple[int, int],
    support: Support,
    names: tuple[str, ...],
) -> NearestPatch:
    shown = support.images[place.image]
    box = _around((place.x, place.y), _extent(region, size), shown.size)
    return NearestPatch(
        image=names[place.image] if place.image < len(names) else str(place.image),
        x=box[0],
        y=box[1],
        box_width=box[2] - box[0],
        box_height=box[3] - box[1],
        width=shown.width,
        height=shown.height,
        distance=place.distance,
        picture_jpeg=_jpeg(shown.crop(box)),
    )


def _resembles(
    look: Look, point: tuple[float, float], support: Support, place: NearestPlace
) -> list[ResemblanceReport]:
    found = support.kinds.of(departure(look.features, point, support.layers, place))
    return [
        ResemblanceReport(
            family=each.family, about=ABOUT[each.family], similarity=round(each.similarity, 3)
        )
        for each in found[:_MOST_KINDS]
    ]


def _jpeg(image: Image.Image) -> str:
    return _base64(encode_jpeg(image, side=_PICTURE_SIDE))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

import io
from math import isqrt

import pytest
import torch
from PIL import Image

from apt_ray.data.folders import Category
from apt_ray.detection.nearest import nearest_places
from apt_ray.detection.prompt_set import THUMBNAIL_SIDE, PromptSet
from apt_ray.detection.rule import Scales
from apt_ray.features.clip import FrozenCLIP
from apt_ray.features.protocol import ImageFeatures
from apt_ray.images import read_image

SCALES = Scales.parse(
    {"prompts": {"mean": 0, "sd": 1}, "layers": {layer: {"mean": 0, "sd": 1} for layer in (2, 3)}}
)


def features_of(layers: dict[int, torch.Tensor]) -> ImageFeatures:
    nothing = torch.zeros(1, 1, 1)
    return ImageFeatures(tokens_BNE=nothing, cls_BE=nothing[:, 0], layers=layers)


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_the_nearest_place_is_found_with_its_distance(length: float) -> None:
    g = torch.Generator().manual_seed(0)
    fine_NMD, coarse_NMD = (
        length * torch.nn.functional.normalize(torch.randn(2, places, 8, generator=g), dim=-1)
        for places in (16, 4)
    )
    # Each place of the second image has moved one to the right; the coarse layer agrees to all.
    support = {2: fine_NMD, 3: coarse_NMD[:, :1].expand(-1, 4, -1)}
    image = {2: fine_NMD[1:].roll(1, dims=1), 3: support[3][1:]}
    points = [(0.3, 0.1), (0.99, 0.99), (0.0, 0.0)]
    found = nearest_places(features_of(image), support, SCALES, points)
    assert [(each.image, each.x, each.y) for each in found] == [
        (1, 0.125, 0.125),
        (1, 0.625, 0.875),
        (1, 0.875, 0.875),
    ]
    assert [each.distance for each in found] == pytest.approx([0, 0, 0], abs=1e-2)
    assert nearest_places(features_of(image), support, SCALES, []) == []


def test_a_support_image_is_nearest_to_its_own_small_copy(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    copies = [Image.open(io.BytesIO(data)) for data in prompt_set.thumbnails]
    paths = category.support_set(3, seed=0)
    assert [path.name for path in paths] == list(prompt_set.provenance.support_names)
    images = [read_image(path) for path in paths]
    assert [copy.size for copy in copies] == [image.size for image in images]
    assert max(images[0].size) <= THUMBNAIL_SIDE
    encoded = backbone.encode_in_batches(backbone.preprocess([c.convert("RGB") for c in copies]))
    shown = backbone.encode_images(backbone.preprocess([images[1]]))
    scales = prompt_set.provenance.scales
    (place,) = nearest_places(shown, encoded.layers, scales, [(0.5, 0.5)])
    side = isqrt(max(tokens.shape[1] for tokens in encoded.layers.values()))
    assert place.image == 1
    assert (place.x, place.y) == pytest.approx((0.5, 0.5), abs=1.5 / side)

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from apt_ray.config import BackboneSpec
from apt_ray.data.folders import Category
from apt_ray.detection.detector import MAX_REGIONS, Detector, find_regions
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import PromptSetError
from apt_ray.features.clip import FrozenCLIP, load_backbone
from apt_ray.images import read_image


def _with_threshold(prompt_set: PromptSet, value: float) -> PromptSet:
    threshold = prompt_set.threshold.model_copy(update={"value": value})
    provenance = prompt_set.provenance.model_copy(update={"threshold": threshold})
    return dataclasses.replace(prompt_set, provenance=provenance)


def test_an_inspection_has_the_size_of_its_image(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    images = [Image.new("RGB", size, "gray") for size in ((1, 1), (301, 57), (20, 900))]
    for image, inspection in zip(
        images, Detector(backbone, prompt_set).inspect(images), strict=True
    ):
        assert inspection.anomaly_map.shape == (image.height, image.width)
        assert inspection.anomaly_map.dtype == np.float32
        assert 0 <= inspection.anomaly_map.min() <= inspection.anomaly_map.max() <= 1
        assert 0 <= inspection.anomaly_score <= 1


def test_a_batch_gives_what_each_image_gives_alone(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    detector = Detector(backbone, prompt_set)
    images = [read_image(image.path) for image in category.test[:4]]
    for alone, together in zip(
        [detector.inspect([image])[0] for image in images], detector.inspect(images), strict=True
    ):
        assert together.anomaly_score == pytest.approx(alone.anomaly_score, abs=1e-5)


def test_the_verdict_follows_the_threshold_and_regions_follow_the_verdict(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    image = read_image(category.test[0].path)
    (low,) = Detector(backbone, _with_threshold(prompt_set, 0.0)).inspect([image])
    (high,) = Detector(backbone, _with_threshold(prompt_set, 1.0)).inspect([image])
    assert low.is_anomalous
    assert low.regions
    assert not high.is_anomalous
    assert high.regions == ()
    assert low.anomaly_score == high.anomaly_score


def test_reference_weights_zero_and_one_use_one_part_only(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    detector = Detector(backbone, prompt_set)
    features = backbone.encode_images(
        backbone.preprocess([read_image(image.path) for image in category.test[:2]])
    )
    prompts, reference, both = (
        detector.score(features, reference_weight=weight)[0] for weight in (0.0, 1.0, 0.5)
    )
    # A mean of squares, and smoothing is linear.
    mean_square = (prompts.square() + reference.square()) / 2
    assert torch.allclose(both.square(), mean_square, atol=1e-5)
    assert not torch.allclose(prompts, reference, atol=1e-3)


def test_a_prompt_set_of_another_backbone_is_refused(prompt_set: PromptSet) -> None:
    with pytest.raises(PromptSetError, match="fitted to another backbone"):
        Detector(load_backbone(BackboneSpec(attention="ordinary")), prompt_set)


def test_regions_are_connected_areas_in_pixels_worst_first() -> None:
    map_HW = np.zeros((10, 20), dtype=np.float32)
    map_HW[1:3, 2:5] = 0.6
    map_HW[3, 5] = 0.7  # touches by a corner
    map_HW[8, 18] = 0.9
    first, second = find_regions(map_HW, 0.5)
    assert (first.x, first.y, first.width, first.height, first.area) == (18, 8, 1, 1, 1)
    assert first.peak == pytest.approx(0.9)
    assert (second.x, second.y, second.width, second.height, second.area) == (2, 1, 4, 3, 7)
    assert find_regions(map_HW, 0.95) == ()


def test_regions_are_those_that_labelled_pixels_have() -> None:
    draw = np.random.default_rng(0)
    for number in range(300):
        map_HW = draw.random(draw.integers(1, 14, 2), dtype=np.float32)
        if number % 2:
            map_HW = np.round(3 * map_HW) / 3  # peaks alike, and none above the threshold
        above_HW = map_HW > 0.6
        labels_HW, count = ndimage.label(above_HW, structure=np.ones((3, 3)))
        expected = []
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels_HW), 1):
            of_region = map_HW[labels_HW == label]
            box = (columns.start, rows.start, columns.stop, rows.stop)
            expected.append((-float(of_region.max()), label, box, of_region.size))
        found = [
            (-each.peak, (each.x, each.y, each.x + each.width, each.y + each.height), each.area)
            for each in find_regions(map_HW, 0.6)
        ]
        worst = sorted(expected)[:MAX_REGIONS]
        assert found == [(peak, box, area) for peak, _, box, area in worst], (number, count)


def test_no_more_regions_are_reported_than_a_person_reads() -> None:
    map_HW = np.zeros((40, 40), dtype=np.float32)
    map_HW[::4, ::4] = np.linspace(0.6, 0.9, 100).reshape(10, 10)
    regions = find_regions(map_HW, 0.5)
    assert len(regions) == MAX_REGIONS
    assert regions[0].peak == pytest.approx(0.9)


def test_a_thin_region_of_interest_counts_and_a_hopeless_one_is_refused(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    image = next(read_image(image.path) for image in category.test if image.is_anomalous)
    low = _with_threshold(prompt_set, 0.2)
    seam = np.zeros((1, 4096), np.bool_)
    seam[0, 2009:2021] = True
    (inspection,) = Detector(backbone, low, region_of_interest=seam).inspect([image])
    assert inspection.anomaly_score > 0
    dot = np.zeros((1000, 1000), np.bool_)
    dot[500, 500] = True
    for region in (dot, dot[:9, :9]):
        with pytest.raises(PromptSetError, match="make the region larger"):
            Detector(backbone, low, region_of_interest=region)
    everywhere = np.ones((1, 1), np.bool_)
    Detector(backbone, _with_threshold(low, 1.0), region_of_interest=everywhere)

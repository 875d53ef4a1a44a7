"""False alarms that join the memory."""

from dataclasses import replace

import pytest
import torch

from apt_ray.data.folders import Category
from apt_ray.detection.calibration import calibrate
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import PromptSetError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.accept import MOST_GROWTH, MOST_PER_IMAGE, accept, grown


def rejecting(prompt_set: PromptSet, threshold: float) -> PromptSet:
    """The same with another threshold."""
    return prompt_set.with_threshold(prompt_set.threshold.moved_to(threshold))


def test_no_score_rises_and_the_accepted_image_passes(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP
) -> None:
    images = [read_image(image.path) for image in category.test]
    good = [
        read for read, image in zip(images, category.test, strict=True) if not image.is_anomalous
    ]
    (alone,) = Detector(backbone, prompt_set).inspect(good[:1])
    strict = rejecting(prompt_set, alone.anomaly_score - 0.01)
    found = accept(strict, good[:1], backbone)
    assert found.before == pytest.approx((alone.anomaly_score,), abs=1e-4)
    assert found.after[0] < found.before[0]
    assert found.passes
    assert found.prompt_set.provenance.accepted == 1
    assert 0 < found.added <= len(strict.memory.layers) * MOST_PER_IMAGE * 768
    old, new = Detector(backbone, strict), Detector(backbone, found.prompt_set)
    before = [each.anomaly_score for each in old.inspect(images)]
    after = [each.anomaly_score for each in new.inspect(images)]
    assert all(late <= early + 1e-4 for early, late in zip(before, after, strict=True))
    # What is registered loads again, and passes its own self-test.
    again = PromptSet.from_bytes(found.prompt_set.to_bytes())
    assert again.provenance.accepted == 1
    assert Detector(backbone, again).probe_score() == pytest.approx(
        again.provenance.probe_score, abs=1e-4
    )


def test_an_estimated_threshold_follows_and_a_certified_one_stays(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP
) -> None:
    images = [read_image(image.path) for image in category.test if image.is_anomalous][:2]
    estimated = prompt_set.threshold
    assert estimated.source == "left-out support images"
    found = accept(prompt_set, images, backbone, force=True).prompt_set.threshold
    assert found.source == estimated.source
    # What shows up in the memory makes left-out parts no less usual.
    assert found.value <= estimated.value
    assert all(new <= old for new, old in zip(found.scores, estimated.scores, strict=True))
    moved = accept(rejecting(prompt_set, 0.3), images, backbone, force=True).prompt_set.threshold
    assert 0.3 - moved.value == pytest.approx(estimated.value - found.value)
    certified = calibrate([0.1 + 0.01 * place for place in range(19)], 0.05)
    kept = accept(prompt_set.with_threshold(certified), images, backbone, force=True)
    assert kept.prompt_set.threshold == certified
    # So does one of a prompt set that holds no copies of its support images.
    bare = replace(prompt_set, thumbnails=())
    assert accept(bare, images, backbone, force=True).prompt_set.threshold == estimated


def test_the_memory_grows_within_its_bound(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP
) -> None:
    images = [read_image(image.path) for image in category.test if image.is_anomalous][:1]
    with torch.inference_mode():
        features = backbone.encode_images(backbone.preprocess(images))
    memory, scales = prompt_set.memory, prompt_set.provenance.scales
    size = max(map(len, memory.layers.values()))
    once = grown(memory, features, scales, size=size)
    twice = grown(once, features, scales, size=size)
    first = sum(map(len, once.layers.values())) - sum(map(len, memory.layers.values()))
    second = sum(map(len, twice.layers.values())) - sum(map(len, once.layers.values()))
    assert first > 0
    assert second <= first  # what it knows already does not join again
    small = max(1, int(size / (1 + MOST_GROWTH)))
    with pytest.raises(PromptSetError, match="fit the category again"):
        grown(memory, features, scales, size=small)

"""False alarms become a version of their own, which serves and can be taken back."""

import json
from functools import partial
from pathlib import Path

import pytest

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import GateError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.accept import accept
from apt_ray.registry import CHAMPION, roll_back
from apt_ray.registry.acceptance import accept_false_alarms
from apt_ray.registry.contents import DATA
from tests.registry.fake import FakeRegistry


@pytest.fixture
def registry(prompt_set: PromptSet, category: Category) -> FakeRegistry:
    """Whose first version serves, and says what it was fitted to."""
    found = FakeRegistry()
    support = category.support_set(3, seed=0)
    found.register(prompt_set, pictures={}, trials=[], support=support)
    return found


def test_a_false_alarm_is_accepted_and_taken_back(
    registry: FakeRegistry, category: Category, backbone: FrozenCLIP, tmp_path: Path
) -> None:
    good = next(image.path for image in category.test if not image.is_anomalous)
    accept_all = partial(accept_false_alarms, registry, category.name, load=lambda _: backbone)
    found = accept_all([good], why="glare of the new lamp")
    assert (found.source, found.version) == (1, 2)
    assert found.acceptance.after[0] < found.acceptance.before[0]
    history = registry.history(category.name)
    assert history.champion == 2
    assert history.moves[-1].action == "accept"
    assert "glare of the new lamp" in history.moves[-1].why
    # Later comparisons know all images that it has seen.
    said = registry.download(registry.resolve(category.name, "2"), DATA, tmp_path)
    assert said is not None
    support = json.loads(said.read_text())["support"]
    assert set(support) == {*(p.name for p in category.support_set(3, seed=0)), good.name}
    assert registry.load(category.name, CHAMPION)[0].provenance.accepted == 1
    roll_back(registry, category.name, why="it was no glare")
    assert registry.history(category.name).champion == 1


def test_a_confirmed_defect_stops_what_would_let_it_pass(
    registry: FakeRegistry, category: Category, backbone: FrozenCLIP
) -> None:
    # The defect itself, accepted by mistake.
    detector = Detector(backbone, registry.load(category.name, CHAMPION)[0])
    bad = [image.path for image in category.test if image.is_anomalous]
    accept_all = partial(accept_false_alarms, registry, category.name, load=lambda _: backbone)
    limit = detector.prompt_set.threshold
    after = {path: self_accepted(detector, path) for path in bad}
    passing = next(path for path, score in after.items() if not limit.rejects(score))
    with pytest.raises(GateError, match="would no longer reject"):
        accept_all([passing], why="glare", defects=[passing])
    assert registry.versions(category.name) == [1]
    assert accept_all([passing], why="glare", defects=[passing], force=True).version == 2


def self_accepted(detector: Detector, path: Path) -> float:
    """The score of an image once it has joined the memory."""
    return accept(detector.prompt_set, [read_image(path)], detector.backbone).after[0]

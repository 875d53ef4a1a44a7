"""Confirmed defects become a version of their own, which serves and can be taken back."""

from dataclasses import replace

import pytest

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import DataError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.registry import CHAMPION, roll_back
from apt_ray.registry.confirmation import confirm_defects
from tests.registry.fake import FakeRegistry


def test_confirmed_defects_serve_and_are_taken_back(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP
) -> None:
    registry = FakeRegistry()
    registry.register(prompt_set, pictures={}, trials=[])
    defects = category.draw_defects(1, seed=0)
    found = confirm_defects(
        registry, category.name, defects, why="shift of Monday", load=lambda _: backbone
    )
    assert (found.source, found.version) == (1, 2)
    history = registry.history(category.name)
    assert history.champion == 2
    assert history.moves[-1].action == "confirm"
    assert "shift of Monday" in history.moves[-1].why
    assert f"1 {defects[0].kind}" in history.moves[-1].why
    serving, _ = registry.load(category.name, CHAMPION)
    assert serving.provenance.kinds == {defect.kind: 1 for defect in defects}
    assert serving.threshold == prompt_set.threshold
    roll_back(registry, category.name)
    assert registry.history(category.name).champion == 1


def test_nothing_is_registered_where_a_defect_is_of_no_kind(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP
) -> None:
    registry = FakeRegistry()
    registry.register(prompt_set, pictures={}, trials=[])
    nameless = [replace(defect, kind="") for defect in category.draw_defects(1, seed=0)]
    with pytest.raises(DataError, match="of no kind"):
        confirm_defects(registry, category.name, nameless, why="-", load=lambda _: backbone)
    assert registry.versions(category.name) == [1]

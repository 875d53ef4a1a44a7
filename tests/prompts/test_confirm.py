"""Confirmed defects that teach kinds."""

from dataclasses import replace
from pathlib import Path

import pytest

from apt_ray.data.folders import Category, Defect
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import DataError, PromptSetError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.confirm import confirm


@pytest.fixture(scope="module")
def defects(category: Category) -> list[Defect]:
    """Two of each kind of the category."""
    return category.draw_defects(2, seed=0)


def test_kinds_are_learned_and_no_verdict_changes(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP, defects: list[Defect]
) -> None:
    found = confirm(prompt_set, defects, backbone)
    kinds = sorted({defect.kind for defect in defects})
    assert found.prompt_set.provenance.kinds == dict.fromkeys(kinds, 2)
    assert len(found.scores) == len(found.named) == len(defects)
    again = PromptSet.from_bytes(found.prompt_set.to_bytes())
    images = [read_image(image.path) for image in category.test]
    before = Detector(backbone, prompt_set).inspect(images)
    after = Detector(backbone, again).inspect(images)
    for old, new in zip(before, after, strict=True):
        assert new.anomaly_score == old.anomaly_score
        assert new.is_anomalous == old.is_anomalous
        assert old.kinds == {}
        assert set(new.kinds) == (set(kinds) if new.is_anomalous else set())
    assert any(new.is_anomalous for new in after)
    assert not all(new.is_anomalous for new in after)
    # An image that was confirmed is called what it was called.
    (own,) = Detector(backbone, again.with_threshold(again.threshold.moved_to(0))).inspect(
        [read_image(defects[0].path)]
    )
    assert max(own.kinds, key=own.kinds.__getitem__) == defects[0].kind


def test_what_is_confirmed_later_adds_to_what_was(
    prompt_set: PromptSet, backbone: FrozenCLIP, defects: list[Defect]
) -> None:
    first, other = defects[0], replace(defects[1], kind="other")
    once = confirm(prompt_set, [first], backbone)
    assert once.named == (None,)  # there is nothing else to name it by
    twice = confirm(once.prompt_set, [other], backbone)
    assert twice.prompt_set.provenance.kinds == {first.kind: 1, "other": 1}
    assert twice.named == (first.kind,)
    # Shown again it is no second example, and what it is called last holds.
    again = confirm(twice.prompt_set, [first, replace(other, kind="pit")], backbone)
    assert again.prompt_set.provenance.kinds == {first.kind: 1, "pit": 1}


def test_without_confirmed_defects_a_prompt_set_says_nothing_of_kinds(
    prompt_set: PromptSet,
) -> None:
    assert b"kinds" not in prompt_set.to_bytes()
    assert PromptSet.from_bytes(prompt_set.to_bytes()).kinds is None


def test_examples_that_do_not_fit_are_refused(
    prompt_set: PromptSet, backbone: FrozenCLIP, defects: list[Defect]
) -> None:
    taught = confirm(prompt_set, defects[:1], backbone).prompt_set
    provenance = taught.provenance.model_copy(update={"kinds": {defects[0].kind: 2}})
    with pytest.raises(PromptSetError, match="do not fit together"):
        PromptSet.from_bytes(replace(taught, provenance=provenance).to_bytes())


def test_a_defect_of_no_kind_and_a_box_elsewhere_are_refused(
    prompt_set: PromptSet, backbone: FrozenCLIP, defects: list[Defect], tmp_path: Path
) -> None:
    twice = [replace(defects[0], kind=kind) for kind in ("nick", "rust")]
    with pytest.raises(DataError, match="are one image of two kinds, nick and rust"):
        confirm(prompt_set, twice, backbone)
    with pytest.raises(DataError, match="is of no kind: move it into a folder"):
        confirm(prompt_set, [replace(defects[0], kind="")], backbone)
    with pytest.raises(DataError, match=r"cannot have that name: \\u202etip has characters"):
        confirm(prompt_set, [replace(defects[0], kind="\u202etip")], backbone)
    for box in ((-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 100_000, 5)):
        with pytest.raises(DataError, match="does not lie in"):
            confirm(prompt_set, [replace(defects[0], mask=None, boxes=(box,))], backbone)


def test_a_box_says_where_to_look(
    prompt_set: PromptSet, backbone: FrozenCLIP, defects: list[Defect]
) -> None:
    def learned(box: tuple[int, int, int, int]) -> PromptSet:
        defect = replace(defects[0], mask=None, boxes=(box,))
        return confirm(prompt_set, [defect], backbone).prompt_set

    corner, other = learned((0, 0, 20, 20)).kinds, learned((30, 30, 20, 20)).kinds
    assert corner is not None
    assert other is not None
    assert not corner.examples_XD.equal(other.examples_XD)

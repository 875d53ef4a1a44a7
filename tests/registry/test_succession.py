"""Who may follow a champion that cannot score here; without a server and a backbone."""

from dataclasses import replace
from typing import Any

import pytest

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.detection.rule import RULE_VERSION
from apt_ray.errors import PromptSetError
from apt_ray.registry import promote
from apt_ray.validation.versions import VersionComparison
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set, register


def of_another_rule(prompt_set: PromptSet) -> PromptSet:
    rule = {"rule_version": RULE_VERSION + 1}
    return replace(prompt_set, provenance=prompt_set.provenance.model_copy(update=rule))


def never(*_: Any) -> VersionComparison:
    raise AssertionError("there is nothing to compare with")


def test_a_champion_of_another_score_rule_does_not_bar_its_successor(category: Category) -> None:
    registry, files = FakeRegistry(), category.good[:3]
    good = make_prompt_set("washer")
    register(registry, of_another_rule(good), support=files[:2], held_out=files[2:])
    register(registry, good, support=files[:2], held_out=files[2:])
    promotion = promote(registry, "washer", compare=never)
    assert promotion.verdict == "uncomparable"
    assert "score rule" in promotion.why
    assert registry.champions()["washer"] == 1
    promote(registry, "washer", force="the rule is another", compare=never)
    assert registry.champions()["washer"] == 2
    # The other way round nothing could serve.
    register(registry, of_another_rule(good), support=files[:2], held_out=files[2:])
    with pytest.raises(PromptSetError, match="score rule"):
        promote(registry, "washer", force="at any price", compare=never)
    assert registry.champions()["washer"] == 2

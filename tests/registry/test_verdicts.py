"""Which verdicts there are, without a server and without a backbone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.05, 0.06, 0.05], "promoted"),
        ([0.05, 0.06, -0.01], "kept"),  # not by more than 2 standard errors
        ([0.30, 0.31, -0.03], "kept"),
        ([0.0, 0.0, 0.0], "kept"),
    ],
)
def test_a_candidate_serves_if_it_is_better_by_more_than_chance(
    category: Category, gains: list[float], verdict: str
) -> None:
    registry, files = FakeRegistry(), category.good[:3]
    seen: list[int] = []

    def compare(
        candidate: PromptSet, champion: PromptSet, images: Any, **_: Any
    ) -> VersionComparison:
        seen.append(len(images))
        champion_SF = np.full((4, len(gains)), 0.6)
        return VersionComparison(
            families=tuple("abc"),
            candidate_SF=champion_SF + np.array(gains),
            champion_SF=champion_SF,
            images=len(images),
        )

    for seed in range(2):
        register(
            registry, make_prompt_set("washer", seed=seed), support=files[:2], held_out=files[2:]
        )
    promotion = promote(registry, "washer", compare=compare, normal=[Path(files[0])])
    assert seen == [1], "images of the support set do not judge"
    assert promotion.verdict == verdict
    assert registry.champions()["washer"] == (2 if verdict == "promoted" else 1)
    assert registry.resolve("washer", "2").tags["verdict"] == verdict

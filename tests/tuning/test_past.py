"""Where a search begins beside the defaults; the registry is in memory."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.registry import Registry
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set, register
from tuning.past import past_settings
from tuning.settings import SearchSettings


@pytest.fixture
def registry() -> Registry:
    return FakeRegistry()


def champion(
    registry: Registry, category: str, *, backbone: BackboneSpec | None = None, **settings: object
) -> None:
    """Register a version of a category, which becomes its champion."""
    prompt_set = make_prompt_set(category)
    provenance = prompt_set.provenance.model_copy(
        update={
            "settings": FitSettings.parse(settings),
            "backbone": backbone or BackboneSpec(),
        }
    )
    register(registry, replace(prompt_set, provenance=provenance))


def weights(registry: Registry, categories: Sequence[str], warm_start: int = 4) -> object:
    settings = SearchSettings(warm_start=warm_start)
    return {
        category: [point["smgs_weight"] for point in points]
        for category, points in past_settings(registry, categories, settings).items()
    }


def test_its_own_champion_comes_first_then_the_commonest(registry: Registry) -> None:
    champion(registry, "washer", smgs_weight=0.1)
    for other in ("bolt", "cable"):
        champion(registry, other, smgs_weight=0.9)
    champion(registry, "disc", smgs_weight=0.5)
    assert weights(registry, ["washer", "new"]) == {
        "washer": [0.1, 0.9, 0.5],
        "new": [0.9, 0.1, 0.5],
    }
    assert weights(registry, ["washer"], warm_start=1) == {"washer": [0.1]}


def test_what_the_space_does_not_hold_is_left_out(registry: Registry) -> None:
    champion(registry, "defaults")
    champion(registry, "long", context_length=32, smgs_weight=0.1)
    champion(registry, "other", smgs_weight=0.2, backbone=BackboneSpec(name="ViT-B-16"))
    champion(registry, "large", smgs_weight=0.3, backbone=BackboneSpec(reference_input_size=384))
    champion(registry, "odd", smgs_weight=0.4, backbone=BackboneSpec(reference_input_size=288))
    assert weights(registry, ["washer"]) == {"washer": [0.3]}


def test_an_empty_registry_and_a_cold_start_give_nothing(registry: Registry) -> None:
    assert weights(registry, ["washer"]) == {"washer": []}
    champion(registry, "bolt", smgs_weight=0.9)
    assert weights(registry, ["washer"], warm_start=0) == {"washer": []}

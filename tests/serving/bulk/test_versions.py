"""serving.bulk.versions: which version inspects, and by which threshold."""

import json
from pathlib import Path

import pytest

from apt_ray.config import OperatorThreshold
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError, RegistryError, SettingsError
from serving.bulk.versions import Version, read_numbers, versions_of
from serving.settings import Fleet
from tests.registry.fake import FakeRegistry


@pytest.fixture
def registry(prompt_set: PromptSet) -> FakeRegistry:
    registry = FakeRegistry()
    for name in ("bottle", "bottle", "cable"):
        registry.register(prompt_set.with_category(name), pictures={}, trials=[])
    return registry


def numbers(versions: dict[str, Version]) -> dict[str, int | None]:
    return {name: version.number for name, version in versions.items()}


def test_the_champion_inspects_unless_another_is_named(registry: FakeRegistry) -> None:
    both = ("bottle", "cable")
    assert numbers(versions_of(both, registry=registry)) == {"bottle": 1, "cable": 1}
    candidates = versions_of(both, registry=registry, alias="candidate")
    assert numbers(candidates) == {"bottle": 2, "cable": 1}
    named = versions_of(both, registry=registry, numbers={"bottle": 2})
    assert numbers(named) == {"bottle": 2, "cable": 1}
    with pytest.raises(RegistryError, match="no category 'screw'"):
        versions_of(["screw"], registry=registry)


def test_a_file_needs_no_registry(prompt_set: PromptSet, tmp_path: Path) -> None:
    prompt_set.save(tmp_path / "x.safetensors")
    found = versions_of(["x"], registry=None, prompt_set=tmp_path / "x.safetensors")
    assert numbers(found) == {"x": None}
    assert found["x"].prompt_set.threshold == prompt_set.threshold


def test_the_fleet_file_decides_and_the_operator_above_it(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    entry = {"version": 2, "threshold": 0.31, "region_of_interest": {"box": [0, 0, 0.5, 1]}}
    (tmp_path / "fleet.yaml").write_text(json.dumps({"categories": {"bottle": entry}}))
    fleet = Fleet.read(tmp_path / "fleet.yaml")
    (plain,) = versions_of(["bottle"], registry=registry, numbers={"bottle": 2}).values()
    (decided,) = versions_of(["bottle"], registry=registry, fleet=fleet).values()
    assert decided.number == 2
    assert decided.prompt_set.threshold.value == 0.31
    assert decided.region_of_interest is not None
    assert decided.identity != plain.identity
    said = OperatorThreshold(value=0.7, reason="dust", by="me", at="2026-01-01T00:00:00Z")
    registry.set_threshold("bottle", said)
    (operated,) = versions_of(["bottle"], registry=registry, fleet=fleet).values()
    assert operated.prompt_set.threshold.value == 0.7
    with pytest.raises(FleetError, match="does not serve cable, but bottle"):
        versions_of(["cable"], registry=registry, fleet=fleet)


def test_numbers_are_read_with_and_without_a_category() -> None:
    assert read_numbers(["3"], "bottle") == {"bottle": 3}
    assert read_numbers(["bottle=3", "cable=4"], None) == {"bottle": 3, "cable": 4}
    for wrong in ("3", "bottle=x", "bottle=0", "=3"):
        with pytest.raises(SettingsError, match="--version"):
            read_numbers([wrong], None)

"""Which version of each category inspects a batch, and by which threshold."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError, SettingsError
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.registry import Registry
from serving.replica.served import decide
from serving.settings import CategoryEntry, Fleet


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Version:
    """What inspects the images of a category, the same from the first to the last.

    Attributes:
        number: in the registry; None of a file.
        prompt_set: with the threshold that holds, and without thumbnails.
        region_of_interest: `(H, W)` bool, stretched over every image; None counts all of it.
        input_size: pixels a side of the images that its backbone takes.
    """

    category: str
    number: int | None
    prompt_set: PromptSet
    region_of_interest: NDArray[np.bool_] | None
    input_size: int

    @property
    def identity(self) -> str:
        """Changes with whatever changes a score or a verdict."""
        digest = hashlib.sha256(self.prompt_set.to_bytes())
        if self.region_of_interest is not None:
            digest.update(repr(self.region_of_interest.shape).encode())
            digest.update(np.packbits(self.region_of_interest).tobytes())
        return digest.hexdigest()


def versions_of(
    categories: Sequence[str],
    *,
    registry: Registry | None,
    prompt_set: Path | None = None,
    numbers: Mapping[str, int] = {},
    alias: str | None = None,
    fleet: Fleet | None = None,
) -> dict[str, Version]:
    """The version of each category, loaded, decided upon and tried on its backbone.

    Args:
        categories: all that images belong to.
        registry: where prompt sets come from; None with `prompt_set`.
        prompt_set: a file, for the only category.
        numbers: versions that are named, by category.
        alias: of those that are not named; None is what the fleet file says, or the champion.
        fleet: whose thresholds and regions of interest hold, below those of operators, which the
            registry keeps; None leaves all of them to the version.

    Raises:
        RegistryError: the registry has no such category or version.
        FleetError: the fleet file does not serve a category, or asks for what a version cannot.
        PromptSetError: a prompt set is damaged or of another backbone.
    """
    backbones: dict[str, Backbone] = {}
    found: dict[str, Version] = {}
    said = registry.categories() if registry is not None and fleet is not None else {}
    for category in categories:
        entry = _entry(category, fleet)
        number: int | None = None
        if prompt_set is not None:
            loaded = PromptSet.load(prompt_set)
        else:
            assert registry is not None
            reference = str(numbers[category]) if category in numbers else alias or entry.reference
            loaded, registered = registry.load(category, reference)
            number = registered.version
        decision, _ = entry.decided(said[category].threshold if category in said else None)
        decided = decide(replace(loaded, thumbnails=()), decision)
        if decided.fingerprint not in backbones:
            backbones[decided.fingerprint] = load_backbone(decided.backbone)
        interest = entry.region_of_interest
        version = Version(
            category=category,
            number=number,
            prompt_set=decided,
            region_of_interest=None if interest is None else interest.mask_HW,
            input_size=backbones[decided.fingerprint].input_size,
        )
        detector_of(version, backbones[decided.fingerprint])
        found[category] = version
    return found


def detector_of(version: Version, backbone: Backbone) -> Detector:
    """The detector of a version; PromptSetError if it does not belong to the backbone."""
    return Detector(backbone, version.prompt_set, region_of_interest=version.region_of_interest)


def category_of(prompt_set: Path) -> str:
    """The category of a prompt set's file; PromptSetError if it cannot be read."""
    return PromptSet.load(prompt_set).category


def read_numbers(texts: Sequence[str], category: str | None) -> dict[str, int]:
    """Versions as the command line gives them, `3` or `bottle=3`, by category."""
    numbers: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        name = name or category or ""
        if not (name and number.isdecimal() and int(number)):
            raise SettingsError(
                f"--version {text}: give the number, as in --version 3, or with several categories"
                f" --version bottle=3"
            )
        numbers[name] = int(number)
    return numbers


def _entry(category: str, fleet: Fleet | None) -> CategoryEntry:
    if fleet is None or not isinstance(fleet.categories, dict):
        return CategoryEntry()
    if category not in fleet.categories:
        raise FleetError(
            f"the fleet file does not serve {category}, but {', '.join(fleet.categories)}: add it"
            f" there, or leave --fleet away"
        )
    return fleet.categories[category]

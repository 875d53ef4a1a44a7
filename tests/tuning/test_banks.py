from typing import Any

from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from tuning.banks import CategoryBanks
from tuning.settings import SearchSettings


def searching(**space: Any) -> SearchSettings:
    axes = {name: {"choices": list(choices)} for name, choices in space.items()}
    learning_rate = {"low": 0.01, "high": 0.1}
    return SearchSettings.parse(
        {
            "shots": 2,
            "support_seeds": (0, 1),
            "space": {"learning_rate": learning_rate, **axes},
            "backbone": {},
        }
    )


def banks_of(settings: SearchSettings, category: Category) -> CategoryBanks:
    supports = [category.support_set(2, seed) for seed in settings.support_seeds]
    specs = [spec for spec, _ in settings.bank_specs(supports, fingerprint="f")]
    refs: Any = {spec.digest: f"ref {place}" for place, spec in enumerate(specs)}
    return CategoryBanks(specs=tuple(specs), refs=refs)


def test_a_trial_learns_from_one_bank_for_each_support_seed(category: Category) -> None:
    banks = banks_of(searching(), category)
    assert [spec.seed for spec in banks.specs] == [0, 1]
    assert all(spec.judged for spec in banks.specs)
    found = banks.of(FitSettings(noise_strength=0.8))
    assert list(found.values()) == ["ref 0", "ref 1"]
    assert list(found) == [spec.digest for spec in banks.specs]


def test_each_place_of_noise_that_is_searched_has_banks_of_its_own(category: Category) -> None:
    # "object" is what files of version 0.1 call "everywhere".
    banks = banks_of(searching(region=("random", "object"), object_mask=(True, False)), category)
    assert len({spec.digest for spec in banks.specs}) == 8
    for region in ("random", "everywhere"):
        for mask in (True, False):
            settings = FitSettings(region=region, object_mask=mask)  # type: ignore[arg-type]
            assert len(banks.of(settings)) == 2
            suited = [spec for spec in banks.specs if spec.digest in banks.of(settings)]
            assert {(spec.region, spec.object_mask) for spec in suited} == {(region, mask)}

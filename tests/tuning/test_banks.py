from typing import Any

from apt_ray.config import BackboneSpec, FitSettings
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
    """With references that are named by the order of encoding, of judges by their encoder, too."""
    supports = [category.support_set(2, seed) for seed in settings.support_seeds]
    specs = [spec for spec, _ in settings.bank_specs(supports, fingerprint="f")]
    judges = [
        spec
        for fingerprint in ("f", "g")
        for spec, _ in settings.judge_specs(supports, fingerprint=fingerprint)
    ]
    refs: Any = {spec.digest: f"ref {place}" for place, spec in enumerate(specs)}
    refs |= {
        spec.digest: f"{spec.fingerprint} {spec.seed} {spec.reference_copies}" for spec in judges
    }
    return CategoryBanks(specs=tuple(specs), judges=tuple(judges), refs=refs)


def test_a_trial_learns_from_one_bank_for_each_support_seed(category: Category) -> None:
    banks = banks_of(searching(), category)
    assert [spec.seed for spec in banks.specs] == [0, 1]
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


def test_a_trial_is_judged_by_what_its_memory_reads_and_holds(category: Category) -> None:
    banks = banks_of(searching(reference_copies=(0, 4)), category)
    settings = FitSettings(reference_copies=4)
    assert list(banks.judging(settings, "f").values()) == ["f 0 4", "f 1 4"]
    assert list(banks.judging(settings, "g").values()) == ["g 0 4", "g 1 4"]
    assert banks.of(settings) == banks.of(FitSettings(reference_copies=0))


def test_trials_that_differ_in_layers_alone_share_a_judge() -> None:
    searched = searching(
        reference_layers=("2,4", "3,4", "4"),
        reference_lengths=(True, False),
        reference_input_size=(256, 320),
    )
    wide = searched.judging()
    assert [spec.reference_input_size for spec in wide] == [256, 320]
    assert {(spec.reference_layers, spec.reference_lengths) for spec in wide} == {((2, 3, 4), True)}

    def judged_by(layers: str, *, lengths: bool) -> tuple[BackboneSpec, tuple[int, ...] | None]:
        return searched.judged_by(
            {
                "reference_layers": layers,
                "reference_lengths": lengths,
                "reference_input_size": 320,
            }
        )

    # Layers are counted; the lengths of the last one come behind them.
    assert judged_by("2,4", lengths=True) == (wide[1], (0, 2, 3))
    assert judged_by("4", lengths=False) == (wide[1], (2,))


def test_where_nothing_of_the_memory_is_searched_the_backbone_judges() -> None:
    searched = searching()
    assert searched.judging() == [searched.backbone]
    assert searched.judged_by({"learning_rate": 0.1}) == (searched.backbone, None)

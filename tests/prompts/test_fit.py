from pathlib import Path

import pytest
from PIL import Image

from apt_ray.anomalies.bank import encode_support
from apt_ray.anomalies.spec import BankSpec
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, support_hash
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import DataError, SettingsError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit

QUICK = FitSettings(steps=3)


def test_a_fit_says_where_it_comes_from(
    prompt_set: PromptSet, category: Category, backbone: FrozenCLIP
) -> None:
    support = category.support_set(3, seed=0)
    provenance = prompt_set.provenance
    assert provenance.category == category.name
    assert provenance.shots == 3
    assert provenance.support_hash == support_hash(support)
    assert provenance.support_names == tuple(path.name for path in support)
    assert provenance.fingerprint == backbone.fingerprint
    assert provenance.settings.steps == 10
    assert prompt_set.contexts.shape[1] == provenance.settings.context_length


def test_left_out_support_images_set_the_threshold(prompt_set: PromptSet) -> None:
    threshold = prompt_set.threshold
    assert threshold.source == "left-out support images"
    assert len(threshold.scores) == 3
    assert not threshold.certified


def test_calibration_images_set_the_threshold_and_enough_of_them_certify_it(
    backbone: FrozenCLIP, category: Category
) -> None:
    support, others = category.good[:2], category.good[2:]
    settings = FitSettings(steps=3, false_alarm_rate=0.2)
    fitted = fit(category.name, support, settings, backbone=backbone, calibration=others)
    assert fitted.threshold.source == "calibration images"
    assert len(fitted.threshold.scores) == len(others)
    assert fitted.threshold.certified_false_alarm_rate == 0.2


def test_one_image_is_enough(backbone: FrozenCLIP, category: Category) -> None:
    fitted = fit(category.name, category.good[:1], QUICK, backbone=backbone)
    assert fitted.threshold.source == "copies of the support image"


def test_copies_neither_teach_nor_certify(
    backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    first, second, third = category.good[:3]
    again = {}
    for path in (first, second, third):
        again[path] = tmp_path / f"{path.stem}.bmp"
        Image.open(path).convert("RGB").save(again[path])
    settings = FitSettings(steps=2, false_alarm_rate=0.3)
    fitted = fit(
        category.name,
        [first, again[first], second],
        settings,
        backbone=backbone,
        calibration=[again[second], third, again[third], third, first],
    )
    assert fitted.provenance.support_names == (first.name, second.name)
    assert fitted.provenance.shots == 2
    assert fitted.provenance.support_hash == support_hash([first, second])
    assert len(fitted.threshold.scores) == 1
    assert not fitted.threshold.certified
    assert fitted.provenance.copies == (
        (again[first].name, first.name),
        (again[second].name, second.name),
        (again[third].name, third.name),
        (third.name, third.name),
        (first.name, first.name),
    )
    assert PromptSet.from_bytes(fitted.to_bytes()).provenance == fitted.provenance
    plain = fit(category.name, [first, second], settings, backbone=backbone, calibration=[third])
    assert plain.threshold == fitted.threshold
    # Where nothing is left to calibrate on, it is as if nothing had been given.
    bare = fit(category.name, [first, first], settings, backbone=backbone, calibration=[first])
    assert bare.threshold.source == "copies of the support image"


def test_a_bank_of_other_images_is_refused(backbone: FrozenCLIP, category: Category) -> None:
    support = category.good[:2]
    spec = BankSpec.of(QUICK, support, fingerprint=backbone.fingerprint)
    bank = encode_support(backbone, [read_image(path) for path in support], spec)
    with pytest.raises(SettingsError, match="holds 2 images, its support set 1"):
        fit(category.name, [support[0]] * 2, QUICK, backbone=backbone, bank=bank)


def test_a_fit_is_repeatable_and_reports_progress(backbone: FrozenCLIP, category: Category) -> None:
    seen: list[tuple[int, int]] = []
    first, second = (
        fit(
            category.name,
            category.good[:2],
            QUICK,
            backbone=backbone,
            progress=lambda done, total: seen.append((done, total)),
        )
        for _ in range(2)
    )
    assert (first.text_features == second.text_features).all()
    assert first.threshold == second.threshold
    assert seen[-1] == (3, 3)


def test_what_cannot_be_fitted_is_refused_by_name(backbone: FrozenCLIP, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="washer has no support image"):
        fit("washer", [], QUICK, backbone=backbone)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(DataError, match=r"broken\.png"):
        fit("washer", [broken], QUICK, backbone=backbone)

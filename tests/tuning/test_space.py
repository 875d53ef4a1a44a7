from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from apt_ray.config import NOISE_LADDER, BackboneSpec, FitSettings
from apt_ray.errors import SettingsError
from tuning.settings import SearchSettings
from tuning.space import (
    PROMPT_SPACE,
    check_space,
    default_space,
    distributions,
    read_space,
    starting_point,
)


def test_the_default_space_holds_valid_settings_and_the_defaults() -> None:
    space = default_space(BackboneSpec())
    check_space(space)
    assert distributions(PROMPT_SPACE) == {
        "context_length": IntDistribution(2, 16),
        "noise_strength": CategoricalDistribution(NOISE_LADDER),
        "smgs_weight": FloatDistribution(0, 1),
        "learning_rate": FloatDistribution(0.003, 0.3, log=True),
    }
    settings = SearchSettings(space=space)
    point = starting_point(space, settings.backbone)
    assert settings.fit_settings(point).model_dump(exclude={"steps", "seed"}) == (
        FitSettings().model_dump(exclude={"steps", "seed"})
    )
    assert {"reference_input_size": 320, "reference_layers": "2,4"}.items() <= point.items()
    for name, value in point.items():
        assert space[name].choices is None or value in space[name].choices


def test_a_memory_that_reads_no_trunk_has_no_settings_of_the_trunk() -> None:
    assert default_space(BackboneSpec(name="ViT-B-16")) == PROMPT_SPACE


def test_a_file_names_another_space(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("reference_weight: {low: 0, high: 1}\nnoise_strength: {choices: [0.1, 0.3]}\n")
    space = read_space(file)
    assert distributions(space)["reference_weight"] == FloatDistribution(0, 1)
    assert starting_point(space, BackboneSpec()) == {
        "noise_strength": 0.3,
        "reference_weight": 0.85,
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "names no setting"),
        ("steps: {low: 1, high: 9}", "cannot be searched"),
        ("smgs_weight: {low: 0, high: 2}", "smgs_weight"),
        ("smgs_weight: {low: 1, high: 0}", "low below high"),
        ("smgs_weight: {low: 0, high: 1, choices: [0]}", "either low and high"),
        ("learning_rate: {low: 0, high: 1, log: true}", "begins above 0"),
        ("noise_strength: {choices: [0.17]}", "noise_strength"),
        ("noise_strength: {low: 0.1, high: 0.3}", "noise_strength"),
        ("object_mask: {low: 0, high: 1}", "list its values"),
        ("false_alarm_rate: {choices: [0.01, 0.05]}", "changes no ranking"),
        ("reference_copies: {low: 0, high: 3}", "encoded anew: list those"),
        ("reference_input_size: {choices: [0]}", "reference_input_size"),
        ("a: [", "cannot read"),
        ("steps: {choices: [8]}\nsteps: {choices: [9]}", "steps stands there twice"),
        ("3: {choices: [8]}", "quote it, '3'"),
        ("learning_rate: {low: 0.1, high: .inf}", "high.* finite number"),
        ("cls_weight: {choices: [.nan, 0.5]}", "finite number"),
    ],
)
def test_a_wrong_space_is_explained(content: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=complaint):
        read_space(file)

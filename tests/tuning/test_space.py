from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from apt_ray.config import NOISE_LADDER, FitSettings
from apt_ray.errors import SettingsError
from tuning.space import DEFAULT_SPACE, check_space, distributions, read_space, starting_point


def test_the_default_space_holds_valid_settings_and_the_defaults() -> None:
    check_space(DEFAULT_SPACE)
    assert distributions(DEFAULT_SPACE) == {
        "context_length": IntDistribution(2, 16),
        "noise_strength": CategoricalDistribution(NOISE_LADDER),
        "smgs_weight": FloatDistribution(0, 1),
        "learning_rate": FloatDistribution(0.003, 0.3, log=True),
    }
    assert FitSettings.parse(starting_point(DEFAULT_SPACE)) == FitSettings()


def test_a_file_names_another_space(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("reference_weight: {low: 0, high: 1}\nnoise_strength: {choices: [0.1, 0.3]}\n")
    space = read_space(file)
    assert distributions(space)["reference_weight"] == FloatDistribution(0, 1)
    assert starting_point(space) == {"noise_strength": 0.3, "reference_weight": 0.85}


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

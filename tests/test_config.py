import pytest

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.errors import SettingsError


def test_the_defaults_are_valid_and_survive_json() -> None:
    for settings in (FitSettings(), BackboneSpec(name="ViT-B-16", reference_layers=(2, 5))):
        assert type(settings).model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_length": 0}, "context_length.*greater than or equal to 1.*got 0"),
        ({"noise_strength": 0.25}, "noise_strength.*one of.*0.2, 0.3"),
        ({"smgs_weight": 1.5, "steps": 0}, "smgs_weight.*steps"),
        ({"smgs_wait": 1}, "smgs_wait.*not permitted"),
    ],
)
def test_what_is_out_of_range_is_named_with_the_range(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        FitSettings.parse(values)

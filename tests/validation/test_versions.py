import numpy as np
import pytest

from apt_ray.validation.versions import VersionComparison

FAMILIES = tuple("abcdefg")


def comparison(
    difference_SF: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> VersionComparison:
    champion_SF = np.full((4, len(FAMILIES)), 0.8)
    return VersionComparison(
        families=FAMILIES,
        candidate_SF=champion_SF + difference_SF,
        champion_SF=champion_SF,
        images=3,
    )


def test_the_error_of_independent_pairs_is_that_of_a_mean() -> None:
    g = np.random.default_rng(0)
    errors = [comparison(g.normal(0, 0.01, (4, len(FAMILIES)))).standard_error for _ in range(200)]
    expected = 0.01 / np.sqrt(4 * len(FAMILIES))
    assert expected < np.mean(errors) < 1.5 * expected


@pytest.mark.parametrize("axis", [0, 1])
def test_pairs_that_are_alike_count_as_few(axis: int) -> None:
    g = np.random.default_rng(0)
    shape = (1, len(FAMILIES)) if axis == 0 else (4, 1)
    alike_SF = np.broadcast_to(g.normal(0, 0.01, shape), (4, len(FAMILIES)))
    of_a_mean = alike_SF.std(ddof=1, axis=None) / np.sqrt(alike_SF.size)
    few = alike_SF.std(ddof=1, axis=1 - axis).max() / np.sqrt(max(shape))
    error = comparison(alike_SF).standard_error
    assert error > 1.5 * of_a_mean
    assert error == pytest.approx(few, rel=0.15)


def test_only_a_gain_in_all_families_beyond_chance_is_promoted() -> None:
    g = np.random.default_rng(0)
    noise_SF = g.normal(0, 0.002, (4, len(FAMILIES)))
    assert comparison(noise_SF + 0.01).verdict == "promoted"
    assert comparison(noise_SF).verdict == "kept"
    uneven_SF = noise_SF + 0.02
    uneven_SF[:, 2] -= 0.05
    found = comparison(uneven_SF)
    assert found.verdict == "kept"
    assert found.worst_family[0] == "c"

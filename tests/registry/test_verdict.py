"""A promotion in words: its reason, its tags and its report, without a registry."""

import numpy as np
import pytest

from apt_ray.registry.promotion import Promotion, explain
from apt_ray.validation.versions import VersionComparison


def _comparison(*gains: float, spread: float = 0.01) -> VersionComparison:
    """Over two seeds, the gain of each family, give or take the spread."""
    champion_SF = np.full((2, len(gains)), 0.8)
    return VersionComparison(
        families=("scratch", "blot", "blur")[: len(gains)],
        candidate_SF=champion_SF + gains + np.array([[spread], [-spread]]),
        champion_SF=champion_SF,
        images=5,
    )


def _promotion(comparison: VersionComparison | None = None, **fields: object) -> Promotion:
    known = {"category": "washer", "candidate": 7, "champion": 3, "verdict": "kept", "why": "so"}
    return Promotion(**{**known, **fields}, comparison=comparison)


@pytest.mark.parametrize(
    ("comparison", "verdict", "why"),
    [
        (_comparison(0.05, 0.05), "promoted", "better by more than 2 standard errors"),
        (
            _comparison(0.05, 0.05, spread=0.05),
            "kept",
            "not better by more than 2 standard errors",
        ),
        (_comparison(0.1, 0.121, -0.071), "kept", "blur is 7.1 points worse"),
    ],
)
def test_a_verdict_is_explained_by_its_numbers(
    comparison: VersionComparison, verdict: str, why: str
) -> None:
    assert comparison.verdict == verdict
    figures, reason = explain(comparison).split(": ")
    assert reason == why
    assert figures == (
        f"validation value +0.0500 ± {comparison.standard_error:.4f} (standard error) on 5 normal"
        f" images that neither was fitted to"
    )


def test_tags_say_what_was_found_and_what_was_decided() -> None:
    assert _promotion().tags() == {"verdict": "kept"}
    assert _promotion(verdict="uncomparable", forced="a new lens").tags() == {
        "verdict": "uncomparable",
        "forced": "a new lens",
    }
    assert _promotion(_comparison(0.05, 0.05), verdict="promoted").tags() == {
        "verdict": "promoted",
        "difference": "+0.0500 ± 0.0082",
        "validation_values": "0.8500 against 0.8000 of version 3",
    }


def test_a_report_is_the_decision_with_its_figures() -> None:
    assert _promotion(champion=None, verdict="promoted", why="there was none").report() == (
        "### Promotion: version 7 of washer against no champion: promoted\n\nThere was none."
    )
    forced = _promotion(_comparison(0.05, -0.1), forced="a new lens")
    assert forced.report().splitlines() == [
        "### Promotion: version 7 of washer against champion 3: kept",
        "",
        "So.",
        "",
        "Promoted in any case: a new lens",
        "",
        "| perturbation | candidate | champion | difference |",
        "|---|---|---|---|",
        "| scratch | 0.8500 | 0.8000 | +0.0500 |",
        "| blot | 0.7000 | 0.8000 | -0.1000 |",
        "| all | 0.7750 | 0.8000 | -0.0250 |",
    ]

"""Verdicts, their words and what follows from them, without a server and without a backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apt_ray.data.distinct import pixel_digest
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.detection.rule import RULE_VERSION
from apt_ray.errors import PromptSetError, RegistryError
from apt_ray.images import read_image
from apt_ray.registry import CHAMPION, RegisteredVersion, promote, roll_back
from apt_ray.registry.promotion import Promotion, explain
from apt_ray.validation.versions import VersionComparison
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set, register


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ...]:
    """Files of plain images of different grays, in the order of their pixels' digests."""
    files = [tmp_path / f"{gray}.png" for gray in range(40)]
    for gray, file in enumerate(files):
        Image.new("L", (4, 4), gray).save(file)
    return tuple(sorted(files, key=lambda file: pixel_digest(read_image(file))))


def of_another_rule(prompt_set: PromptSet) -> PromptSet:
    rule = {"rule_version": RULE_VERSION + 1}
    return replace(prompt_set, provenance=prompt_set.provenance.model_copy(update=rule))


def never(*_: Any) -> VersionComparison:
    raise AssertionError("there is nothing to compare with")


def test_a_champion_of_another_score_rule_does_not_bar_its_successor(
    images: tuple[Path, ...],
) -> None:
    registry, files = FakeRegistry(), images[:3]
    good = make_prompt_set("washer")
    register(registry, of_another_rule(good), support=files[:2], held_out=files[2:])
    register(registry, good, support=files[:2], held_out=files[2:])
    promotion = promote(registry, "washer", compare=never)
    assert promotion.verdict == "uncomparable"
    assert "score rule" in promotion.why
    assert registry.champions()["washer"] == 1
    promote(registry, "washer", force="the rule is another", compare=never)
    assert registry.champions()["washer"] == 2
    # The other way round nothing could serve.
    register(registry, of_another_rule(good), support=files[:2], held_out=files[2:])
    with pytest.raises(PromptSetError, match="score rule"):
        promote(registry, "washer", force="at any price", compare=never)
    assert registry.champions()["washer"] == 2


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.05, 0.06, 0.05], "promoted"),
        ([0.05, 0.06, -0.01], "kept"),  # not by more than 2 standard errors
        ([0.30, 0.31, -0.03], "kept"),
        ([0.0, 0.0, 0.0], "kept"),
    ],
)
def test_a_candidate_serves_if_it_is_better_by_more_than_chance(
    images: tuple[Path, ...], gains: list[float], verdict: str
) -> None:
    registry, files = FakeRegistry(), images[:3]
    seen: list[int] = []

    def compare(
        candidate: PromptSet, champion: PromptSet, shown: Sequence[Image.Image], **_: Any
    ) -> VersionComparison:
        seen.append(len(shown))
        champion_SF = np.full((4, len(gains)), 0.6)
        return VersionComparison(
            families=tuple("abc"),
            candidate_SF=champion_SF + np.array(gains),
            champion_SF=champion_SF,
            images=len(shown),
        )

    for seed in range(2):
        register(
            registry, make_prompt_set("washer", seed=seed), support=files[:2], held_out=files[2:]
        )
    promotion = promote(
        registry, "washer", compare=compare, normal=[Path(files[0])], why="the new lamp"
    )
    assert seen == [1], "images of the support set do not judge"
    assert promotion.verdict == verdict
    assert registry.champions()["washer"] == (2 if verdict == "promoted" else 1)
    assert registry.resolve("washer", "2").tags["verdict"] == verdict
    if promotion.move:
        assert promotion.move.why == f"the new lamp: {promotion.why}"


def comparison_of(*gains: float, spread: float = 0.01) -> VersionComparison:
    """Over two seeds, the gain of each family, give or take the spread."""
    champion_SF = np.full((2, len(gains)), 0.8)
    return VersionComparison(
        families=("scratch", "blot", "blur")[: len(gains)],
        candidate_SF=champion_SF + gains + np.array([[spread], [-spread]]),
        champion_SF=champion_SF,
        images=5,
    )


def promotion_of(comparison: VersionComparison | None = None, **fields: object) -> Promotion:
    known = {"category": "washer", "candidate": 7, "champion": 3, "verdict": "kept", "why": "so"}
    return Promotion(**{**known, **fields}, comparison=comparison)


@pytest.mark.parametrize(
    ("comparison", "verdict", "why"),
    [
        (comparison_of(0.05, 0.05), "promoted", "better by more than 2 standard errors"),
        (
            comparison_of(0.05, 0.05, spread=0.05),
            "kept",
            "not better by more than 2 standard errors",
        ),
        (comparison_of(0.1, 0.121, -0.071), "kept", "blur is 7.1 points worse"),
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
    assert promotion_of().tags() == {"verdict": "kept"}
    assert promotion_of(verdict="uncomparable", forced="a new lens").tags() == {
        "verdict": "uncomparable",
        "forced": "a new lens",
    }
    assert promotion_of(comparison_of(0.05, 0.05), verdict="promoted").tags() == {
        "verdict": "promoted",
        "difference": "+0.0500 ± 0.0082",
        "validation_values": "0.8500 against 0.8000 of version 3",
        "judged_on": "5 images against version 3",
    }


def test_a_report_is_the_decision_with_its_figures() -> None:
    assert promotion_of(champion=None, verdict="promoted", why="there was none").report() == (
        "### Promotion: version 7 of washer against no champion: promoted\n\nThere was none."
    )
    forced = promotion_of(comparison_of(0.05, -0.1), forced="a new lens")
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


class Remembering(FakeRegistry):
    """Keeps the reports, too."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[int, str, str]] = []

    def annotate(
        self, registered: RegisteredVersion, tags: Mapping[str, str], *, report: str, name: str
    ) -> None:
        super().annotate(registered, tags, report=report, name=name)
        self.reports.append((registered.version, name, report))


def contest(registry: FakeRegistry, *sides: tuple[tuple[Path, ...], tuple[Path, ...]]) -> None:
    """Registers a version for each support set and the normal images kept beside it."""
    for seed, (support, held_out) in enumerate(sides):
        prompt_set = make_prompt_set("washer", seed=seed)
        register(registry, prompt_set, support=support, held_out=held_out)


def test_both_are_judged_on_all_images_that_neither_was_fitted_to(
    images: tuple[Path, ...],
) -> None:
    registry = Remembering()
    contest(registry, (images[0:2], images[1:4]), (images[3:5], images[5:6]))
    seen: list[int] = []

    def compare(
        candidate: PromptSet, champion: PromptSet, shown: Sequence[Image.Image], **_: Any
    ) -> VersionComparison:
        assert (candidate.settings.seed, champion.settings.seed) == (1, 0)
        seen[:] = [image.getpixel((0, 0))[0] for image in shown]
        return comparison_of(0.05, 0.05)

    def shown_with(*normal: Path) -> list[str]:
        promote(registry, "washer", "2", compare=compare, normal=normal)
        registry.set_alias("washer", CHAMPION, 1)
        return [f"{gray}.png" for gray in seen]

    assert shown_with() == [images[2].name, images[5].name]
    others = (images[9], images[7], images[4], images[0])  # the last two were fitted to
    assert shown_with(*others) == [images[place].name for place in (2, 5, 7, 9)]
    # Sixteen are enough, wherever they come from.
    assert shown_with(*images) == [path.name for path in (images[2], *images[5:20])]


def test_what_was_decided_is_kept_with_the_candidate(images: tuple[Path, ...]) -> None:
    registry = Remembering()
    contest(registry, (images[:2], images[2:4]), (images[:2], images[4:6]))
    kept = promote(registry, "washer", compare=lambda *_: comparison_of(0.0, 0.0))
    assert (kept.candidate, kept.champion, kept.verdict, kept.move) == (2, 1, "kept", None)
    assert kept.why.endswith("not better by more than 2 standard errors")
    assert registry.resolve("washer", "2").tags["validation_values"].endswith("of version 1")
    assert registry.reports == [(2, "promotion-after-1-moves", kept.report())]
    assert kept.report().startswith("### Promotion: version 2 of washer against champion 1: kept")

    forced = promote(
        registry, "washer", force="a new lens", compare=lambda *_: comparison_of(0.0, 0.0)
    )
    assert (forced.verdict, forced.forced) == ("kept", "a new lens")
    assert forced.move is not None
    assert (forced.move.action, forced.move.source, forced.move.target) == ("promote", 1, 2)
    assert forced.move.why == f"forced: a new lens ({forced.why})"
    assert registry.reports[1] == (2, "promotion-after-1-moves", forced.report())
    assert forced.report().endswith(f"Moved by somebody@memory at {forced.move.at}.")
    with pytest.raises(RegistryError, match="version 2 of washer is the champion already"):
        promote(registry, "washer", compare=never)


def test_a_promoted_version_moves_for_the_reason_that_was_found(images: tuple[Path, ...]) -> None:
    registry = Remembering()
    contest(registry, (images[:2], images[2:4]), (images[:2], images[4:6]))
    promotion = promote(registry, "washer", compare=lambda *_: comparison_of(0.05, 0.05))
    assert promotion.move == registry.history("washer").moves[-1]
    assert promotion.move.why == promotion.why
    assert promotion.forced is None
    # Without a champion there is nobody to beat.
    registry.set_alias("washer", CHAMPION, None)
    promotion = promote(registry, "washer", "1", compare=never)
    assert (promotion.verdict, promotion.champion) == ("promoted", None)
    assert promotion.why == "there was no champion"
    assert registry.champions()["washer"] == 1


def test_without_images_to_judge_on_nothing_is_compared(images: tuple[Path, ...]) -> None:
    registry = Remembering()
    contest(registry, (images[:2], ()), (images[:2], ()), ((), ()))
    promotion = promote(registry, "washer", "2", compare=never, normal=images[:2])
    assert promotion.verdict == "uncomparable"
    assert promotion.why == (
        "there is no normal image that is in neither support set: name a folder with more normal"
        " images (--data)"
    )
    promotion = promote(registry, "washer", "3", compare=never, normal=images)
    assert promotion.verdict == "uncomparable"
    assert promotion.why == "version 3 does not say which images it was fitted to"
    assert registry.champions()["washer"] == 1


def test_the_way_back_passes_over_what_was_deleted() -> None:
    registry = Remembering()
    contest(registry, *[((), ())] * 4)
    for version in ("2", "3", "4"):
        promote(registry, "washer", version, force="its turn", compare=never)
    registry.delete("washer", 3)
    move = roll_back(registry, "washer", why="rejects good parts")
    assert (move.action, move.source, move.target) == ("rollback", 4, 2)
    assert move.why == "rejects good parts"
    assert roll_back(registry, "washer").why == "no reason given"
    with pytest.raises(
        RegistryError, match="no version of washer served before version 1: there is nothing"
    ):
        roll_back(registry, "washer")

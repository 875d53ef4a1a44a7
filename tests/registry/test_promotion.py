"""Promotion, history and the way back, against a real MLflow server."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from apt_ray.anomalies.families import SELECTION
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import RegistryConflictError, RegistryError
from apt_ray.registry import Registry, open_registry, promote, roll_back
from apt_ray.registry.mlflow import moves
from apt_ray.registry.mlflow.names import MARK
from apt_ray.validation import versions
from apt_ray.validation.versions import VersionComparison, compare_prompt_sets
from tests.registry.registering import make_prompt_set, register, spoilt


@pytest.fixture
def registry(mlflow_server: str) -> Registry:
    return open_registry(mlflow_server)


@pytest.fixture(autouse=True)
def _quick_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "SEEDS", 2)


@pytest.fixture
def pictures(category: Category) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The support set of the shared prompt set, and other normal images."""
    support = category.support_set(3, seed=0)
    return support, tuple(path for path in category.good if path not in support)[:2]


def test_a_better_candidate_becomes_champion_and_a_worse_one_does_not(
    registry: Registry,
    mlflow_server: str,
    prompt_set: PromptSet,
    pictures: tuple[tuple[Path, ...], tuple[Path, ...]],
) -> None:
    support, others = pictures
    good = prompt_set.with_category("contest")
    register(registry, spoilt(good), support=support, held_out=others)
    register(registry, good, support=support, held_out=others)
    parts: list[tuple[int, int]] = []
    promotion = promote(
        registry,
        "contest",
        compare=partial(compare_prompt_sets, progress=lambda *part: parts.append(part)),
    )
    assert promotion.verdict == "promoted"
    assert promotion.comparison is not None
    assert promotion.comparison.difference > 0.1
    assert promotion.comparison.images == 2
    assert parts[-1] == (2 * len(SELECTION), 2 * len(SELECTION))
    champion = registry.resolve("contest")
    assert champion.version == 2
    assert champion.tags["verdict"] == "promoted"
    assert champion.tags["validation_values"].endswith(" of version 1")
    assert champion.tags["difference"].startswith("+0.")
    client = MlflowClient(mlflow_server)
    page = client.get_model_version("apt-contest", "2").description
    assert page.count("### Promotion: version 2 of contest against champion 1: promoted") == 1
    assert "| scratch&emsp; |" in page
    (report,) = client.list_artifacts(champion.run_id, "reports")
    assert "| all |" in Path(client.download_artifacts(champion.run_id, report.path)).read_text()

    register(registry, spoilt(good), support=support, held_out=others)
    promotion = promote(registry, "contest")
    assert (promotion.verdict, promotion.move) == ("kept", None)
    assert registry.champions()["contest"] == 2
    assert registry.resolve("contest", "3").tags["verdict"] == "kept"
    # The very same prompt set is no better than itself.
    register(registry, good, support=support, held_out=others)
    assert promote(registry, "contest").verdict == "kept"

    forced = promote(registry, "contest", force="the line was rebuilt")
    assert (forced.verdict, registry.champions()["contest"]) == ("kept", 4)
    assert registry.history("contest").moves[-1].why.startswith("forced: the line was rebuilt (")
    assert registry.resolve("contest").tags["forced"] == "the line was rebuilt"


def test_a_verdict_on_fewer_images_does_not_overrule_one_on_more(
    registry: Registry,
    prompt_set: PromptSet,
    category: Category,
    pictures: tuple[tuple[Path, ...], tuple[Path, ...]],
) -> None:
    support, others = pictures
    more = tuple(path for path in category.good if path not in support)[:3]
    good = prompt_set.with_category("recount")
    for _ in range(2):
        register(registry, good, support=support, held_out=others)
    compared: list[int] = []

    def compare(
        candidate: PromptSet, champion: PromptSet, images: Sequence[Image.Image]
    ) -> VersionComparison:
        """Finds the candidate no better on three images, and better on any two of them."""
        compared.append(len(images))
        better = spoilt(champion) if len(images) == 2 else champion
        return compare_prompt_sets(candidate, better, images)

    kept = promote(registry, "recount", normal=more, compare=compare)
    assert kept.verdict == "kept"
    assert registry.resolve("recount", "2").tags["judged_on"] == "3 images against version 1"
    again = promote(registry, "recount", compare=compare)
    assert (again.verdict, again.move) == ("kept", None)
    assert "kept before, on 3 normal images" in again.report()
    assert "--data" in again.why
    assert compared == [3]
    assert registry.resolve("recount", "2").tags["judged_on"] == "3 images against version 1"
    # As many decide anew; a person may; and against another champion it is another question.
    assert promote(registry, "recount", normal=more, compare=compare).verdict == "kept"
    forced = promote(registry, "recount", force="the line was rebuilt", compare=compare)
    assert forced.move
    assert "kept before, on 3 normal images" in registry.history("recount").moves[-1].why
    promote(registry, "recount", "1", force="back", compare=compare)
    register(registry, good, support=support, held_out=others)
    assert promote(registry, "recount", compare=compare).verdict == "promoted"
    assert compared == [3, 3, 2, 2]


def test_without_pictures_in_neither_support_set_a_person_decides(
    registry: Registry,
    prompt_set: PromptSet,
    pictures: tuple[tuple[Path, ...], tuple[Path, ...]],
    tmp_path: Path,
) -> None:
    support, others = pictures
    for _ in range(2):
        register(registry, prompt_set.with_category("bare"), support=support)
    promotion = promote(registry, "bare")
    assert promotion.verdict == "uncomparable"
    assert "--data" in promotion.why
    assert registry.champions()["bare"] == 1
    # Images of the support set do not count, others do.
    assert promote(registry, "bare", normal=support).verdict == "uncomparable"
    assert promote(registry, "bare", normal=(*support, *others)).verdict == "kept"
    copies = tuple(tmp_path / f"{path.stem}.bmp" for path in support)
    for path, copy in zip(support, copies, strict=True):
        Image.open(path).convert("RGB").save(copy)
    assert promote(registry, "bare", normal=copies).verdict == "uncomparable"
    register(registry, prompt_set.with_category("bare"))
    promotion = promote(registry, "bare", normal=others)
    assert promotion.verdict == "uncomparable"
    assert "version 3 does not say" in promotion.why


@pytest.fixture
def served(registry: Registry) -> Callable[[str, int], None]:
    """Registers versions of a category and lets each serve in turn."""

    def serve(category: str, versions: int) -> None:
        for seed in range(versions):
            registry.register(make_prompt_set(category, seed=seed), pictures={}, trials=[])
            if seed:
                promote(registry, category, force=f"turn {seed + 1}")

    return serve


def test_each_roll_back_goes_one_further(
    registry: Registry, mlflow_server: str, served: Callable[[str, int], None]
) -> None:
    served("back", 4)
    assert [move.target for move in registry.history("back").moves] == [1, 2, 3, 4]
    move = roll_back(registry, "back", why="rejects good parts")
    assert (move.source, move.target, move.why) == (4, 3, "rejects good parts")
    client = MlflowClient(mlflow_server)
    client.delete_model_version("apt-back", "2")
    assert roll_back(registry, "back").target == 1  # version 2 is no more
    assert registry.champions()["back"] == 1
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        roll_back(registry, "back")
    promote(registry, "back", "4", force="again")
    assert roll_back(registry, "back").target == 1
    page = client.get_registered_model("apt-back").description.replace("&emsp;", "")
    assert "| rollback | 4 → 3 | rejects good parts |" in page


def test_a_move_by_hand_is_seen_and_can_be_undone(
    registry: Registry, mlflow_server: str, served: Callable[[str, int], None]
) -> None:
    served("hand", 2)
    client = MlflowClient(mlflow_server)
    client.set_registered_model_alias("apt-hand", "champion", "1")
    last = registry.history("hand").moves[-1]
    assert (last.action, last.source, last.target) == ("by hand", 2, 1)
    assert roll_back(registry, "hand").target == 2
    actions = [move.action for move in registry.history("hand").moves]
    assert actions == ["first", "promote", "by hand", "rollback"]
    assert [move.number for move in registry.history("hand").moves] == [1, 2, 3, 4]


def test_a_move_that_died_halfway_holds_up_nobody_for_long(
    registry: Registry,
    mlflow_server: str,
    served: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served("died", 2)
    client = MlflowClient(mlflow_server)
    client.create_registered_model("moving-apt-died-3-0", {MARK: "move"}, "ann@host is moving it")
    client.create_registered_model("moving-apt-died-3-1", description="somebody else's")
    with pytest.raises(RegistryConflictError, match="ann@host"):
        roll_back(registry, "died")
    monkeypatch.setattr(moves, "_ABANDONED_S", 0.0)
    assert roll_back(registry, "died").target == 1
    left = client.search_registered_models("name LIKE 'moving-%'")
    assert [model.name for model in left if "died" in model.name] == ["moving-apt-died-3-1"]

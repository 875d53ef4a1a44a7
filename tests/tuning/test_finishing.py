"""The end of a category's search, without Ray: fits are canned, the registry is in memory."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apt_ray.data.folders import Category, find_categories
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.registry import CANDIDATE, CHAMPION, Registry, default_pending
from apt_ray.validation.versions import VersionComparison
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set
from tuning import finishing
from tuning.actors import FitJob
from tuning.finishing import Finisher
from tuning.outcome import Outcome
from tuning.records import SearchStore, TrialRecord
from tuning.settings import SearchSettings
from tuning.space import starting_point

SETTINGS = SearchSettings(shots=2, support_seeds=(0,), trials=2, scheduler="none", steps=8)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finishing, "_REGISTRY_RETRY_S", 0.05)
    monkeypatch.setenv("APT_RAY_PENDING", str(tmp_path / "pending"))


@pytest.fixture
def category(tmp_path: Path) -> Category:
    folder = tmp_path / "data" / "washer"
    folder.mkdir(parents=True)
    for level in range(5):
        Image.new("RGB", (8, 8), (40 * level, 0, 0)).save(folder / f"{level}.png")
    (found,) = find_categories(folder)
    return found


class Search:
    """What surrounds a finisher: its store, and the cluster's part as canned answers."""

    def __init__(self, folder: Path, name: str, *, gain: float = 0.0) -> None:
        self.store = SearchStore(str(folder), name)
        self.outcome = Outcome()
        self.jobs: list[FitJob] = []
        self.compared = 0
        self._gain = gain
        for number, value in enumerate((0.7, 0.8)):
            trial = TrialRecord(
                category="washer",
                number=number,
                settings=starting_point(SETTINGS.space, SETTINGS.backbone),
                steps=(2, 4, 6),
                validation=(0.5, 0.6, value),
                validation_sd=(0.1, 0.1, 0.1),
                patch=(0.5, 0.6, value),
                seconds=(1.0, 2.0, 3.0),
                status="stopped early",
            )
            self.store.save_trial(trial)

    def finisher(self, registry: Registry, *, promote: str = "auto") -> Finisher:
        """One of a new process, with an outcome of its own."""
        self.outcome = Outcome()
        return Finisher(
            SETTINGS.model_copy(update={"promote": promote}),
            self.store,
            registry,
            {"git_commit": "c0ffee"},
            self.outcome,
            fit=self._fit,
            compare=self._compare,
        )

    def _fit(self, job: FitJob) -> tuple[bytes, dict[str, Image.Image]]:
        self.jobs.append(job)
        return make_prompt_set(job.category).to_bytes(), {
            "support_images": Image.new("RGB", (8, 8))
        }

    def _compare(
        self, candidate: PromptSet, champion: PromptSet, images: Sequence[Image.Image]
    ) -> VersionComparison:
        self.compared += 1
        champion_SF = np.full((2, 2), 0.8)
        return VersionComparison(
            families=("scratch", "stain"),
            candidate_SF=champion_SF + self._gain,
            champion_SF=champion_SF,
            images=len(images),
        )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_winner_is_fitted_and_registered_with_its_provenance(
    tmp_path: Path, category: Category
) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    finisher = search.finisher(registry)
    finisher.start(category, "complete")
    assert finisher.wait(60)
    assert search.outcome.failures == {}
    (tuned,) = search.outcome.tuned
    assert tuned.winner.number == 1
    (job,) = search.jobs
    assert len(job.support) == 2
    assert set(job.support) | set(job.calibration) == set(category.good)
    assert (job.settings.steps, job.metrics["validation"]) == (8, 0.8)
    assert job.labelled == category

    prompt_set, version = registry.load("washer")
    assert version == tuned.version
    assert search.store.read("washer/prompt_set.safetensors") == prompt_set.to_bytes()
    assert version.tags["search"] == "one"
    assert version.tags["search_status"] == "complete"
    assert version.tags["search_verdict"] == tuned.verdict
    assert version.tags["git_commit"] == "c0ffee"
    pictures = registry.download(version, "pictures", tmp_path)
    assert pictures is not None
    assert {path.stem for path in pictures.iterdir()} >= {"support_images", "trials", "slices"}
    table = registry.download(version, "trials.csv", tmp_path)
    assert table is not None
    assert len(table.read_text().splitlines()) == 3


def test_a_second_start_does_nothing(tmp_path: Path, category: Category) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    finisher = search.finisher(registry)
    for status in ("complete", "cut off"):
        finisher.start(category, status)
        assert finisher.wait(60)
    assert len(search.jobs) == len(search.outcome.tuned) == 1
    assert registry.versions("washer") == [1]


def test_a_registry_that_is_away_is_waited_for(tmp_path: Path, category: Category) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    registry.is_away = True
    finisher = search.finisher(registry)
    finisher.start(category, "complete")
    wait_for(lambda: search.jobs)
    assert not finisher.wait(0.3)
    registry.is_away = False
    assert finisher.wait(60)
    assert [tuned.version.version for tuned in search.outcome.tuned] == [1]
    assert len(search.jobs) == 1
    assert not default_pending().exists()


def test_who_cannot_wait_keeps_the_version_on_disk_and_it_is_registered_once(
    tmp_path: Path, category: Category
) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    registry.is_away = True
    finisher = search.finisher(registry)
    finisher.hurry()
    finisher.start(category, "complete")
    assert finisher.wait(60)
    assert "apt-ray registry pending" in search.outcome.failures["washer"]

    registry.is_away = False
    (registered,) = registry.register_pending(default_pending())
    assert registered.tags["search"] == "one"
    resumed = search.finisher(registry)
    resumed.start(category, "complete")
    assert resumed.wait(60)
    assert [tuned.version.version for tuned in search.outcome.tuned] == [1]
    assert registry.versions("washer") == [1]


@pytest.mark.parametrize(("gain", "verdict", "champion"), [(0.1, "promoted", 2), (0.0, "kept", 1)])
def test_a_later_winner_serves_if_it_is_better(
    gain: float, verdict: str, champion: int, tmp_path: Path, category: Category
) -> None:
    registry = FakeRegistry()
    first, second = Search(tmp_path, "first"), Search(tmp_path, "second", gain=gain)
    for search in (first, second, second):  # the last as after a kill: what was decided stands
        finisher = search.finisher(registry)
        finisher.start(category, "complete")
        assert finisher.wait(60)
        assert search.outcome.failures == {}
    assert registry.versions("washer") == [2, 1]
    assert registry.champions() == {"washer": champion}
    assert registry.resolve("washer", CANDIDATE).tags["verdict"] == verdict
    assert (first.compared, second.compared) == (0, 1)


def test_what_was_cut_off_stays_a_candidate(tmp_path: Path, category: Category) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    finisher = search.finisher(registry)
    finisher.start(category, "cut off")
    assert finisher.wait(60)
    (job,) = search.jobs
    assert (job.settings.steps, job.labelled) == (6, None)
    version = registry.resolve("washer", CANDIDATE)
    assert version.tags["search_status"] == "cut off"
    assert CHAMPION not in version.aliases


def test_a_person_may_promote_alone(tmp_path: Path, category: Category) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    finisher = search.finisher(registry, promote="never")
    finisher.start(category, "complete")
    assert finisher.wait(60)
    assert registry.champions() == {}


def test_a_picture_that_is_gone_fails_its_category(tmp_path: Path, category: Category) -> None:
    registry, search = FakeRegistry(), Search(tmp_path, "one")
    category.good[0].unlink()
    finisher = search.finisher(registry)
    finisher.start(category, "complete")
    assert finisher.wait(60)
    assert "cannot read" in search.outcome.failures["washer"]
    assert registry.aliases() == {}

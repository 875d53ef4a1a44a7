"""What holds of every registry: of MLflow's, and of the one in memory that other tests use."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from mlflow import MlflowClient

from apt_ray.config import OperatorThreshold
from apt_ray.data.folders import Category
from apt_ray.errors import PromptSetError, RegistryConflictError, RegistryError, SettingsError
from apt_ray.registry import (
    CANDIDATE,
    CHAMPION,
    LoggedTrial,
    Move,
    Registry,
    discard,
    open_registry,
)
from apt_ray.registry.mlflow.names import model_name
from tests.registry.fake import FakeRegistry
from tests.registry.registering import logged_trials, make_prompt_set

SetAlias = Callable[[str, str, int], None]


@pytest.fixture(params=["memory", "mlflow"])
def registry(request: pytest.FixtureRequest) -> Registry:
    if request.param == "memory":
        return FakeRegistry()
    return open_registry(request.getfixturevalue("mlflow_server"))


@pytest.fixture
def set_alias(registry: Registry) -> SetAlias:
    """Moves an alias past apt-ray."""
    if isinstance(registry, FakeRegistry):
        return registry.set_alias
    client = MlflowClient(registry.address)

    def move(category: str, alias: str, version: int) -> None:
        client.set_registered_model_alias(model_name(category), alias, str(version))

    return move


def register(registry: Registry, category: str, *, versions: int = 1) -> None:
    for seed in range(versions):
        registry.register(make_prompt_set(category, seed=seed), pictures={}, trials=[])


def test_the_first_version_is_candidate_and_champion(registry: Registry) -> None:
    prompt_set = make_prompt_set("first")
    registered = registry.register(prompt_set, pictures={}, trials=[])
    assert (registered.category, registered.version) == ("first", 1)
    assert set(registered.aliases) == {CANDIDATE, CHAMPION}
    assert registered.settings["seed"] == "0"
    assert registered.metrics["validation"] == 0.9125
    loaded, version = registry.load("first")
    assert loaded.to_bytes() == prompt_set.to_bytes()
    assert version == registry.resolve("first", CANDIDATE)
    assert version.run_id == registered.run_id


def test_a_later_version_is_the_candidate_only(registry: Registry) -> None:
    register(registry, "later", versions=2)
    assert registry.resolve("later").version == 1
    assert registry.resolve("later", CANDIDATE).version == 2
    assert registry.resolve("later", "2").aliases == (CANDIDATE,)
    loaded, _ = registry.load("later", "2")
    assert loaded.settings.seed == 1
    assert registry.versions("later") == [2, 1]


def test_a_version_that_may_not_serve_is_no_champion(registry: Registry) -> None:
    for seed, promote in enumerate((False, True)):
        assert "cautious" not in registry.champions()
        registry.register(
            make_prompt_set("cautious", seed=seed), pictures={}, trials=[], promote=promote
        )
    assert registry.champions()["cautious"] == 2


def test_a_submission_is_one_version_however_often_it_is_repeated(registry: Registry) -> None:
    for seed in (0, 1, 0):
        registered = registry.register(
            make_prompt_set("again", seed=seed), pictures={}, trials=[], submission=f"again/{seed}"
        )
    assert registered.version == 1
    assert registry.versions("again") == [2, 1]
    assert registry.resolve("again", CANDIDATE).version == 2


def test_aliases_of_all_categories_come_at_once(registry: Registry, set_alias: SetAlias) -> None:
    register(registry, "many", versions=2)
    register(registry, "one")
    set_alias("one", "spare", 1)
    aliases = registry.aliases()
    assert aliases["many"] == {CHAMPION: 1, CANDIDATE: 2}
    assert aliases["one"] == {CHAMPION: 1, CANDIDATE: 1, "spare": 1}
    assert registry.resolve("one", "spare").version == 1


def test_what_does_not_exist_is_named_beside_what_does(registry: Registry) -> None:
    register(registry, "existing")
    for ask in (registry.load, registry.resolve, registry.history):
        with pytest.raises(RegistryError, match=r"no category 'absent'; it has .*existing"):
            ask("absent")
    with pytest.raises(RegistryError, match=r"'beta' .*champion \(version 1\)"):
        registry.resolve("existing", "beta")
    with pytest.raises(RegistryError, match="no version or alias '99'"):
        registry.resolve("existing", "99")
    assert registry.versions("absent") == []


@pytest.mark.parametrize("name", ["two words", "it's", "a/b", "", "größe", "a.b", "nut\n"])
def test_what_cannot_stand_in_an_address_is_not_registered(registry: Registry, name: str) -> None:
    with pytest.raises(SettingsError, match="letters, digits"):
        register(registry, name)


def test_a_prompt_set_of_another_backbone_is_refused(registry: Registry) -> None:
    register(registry, "bound")
    with pytest.raises(PromptSetError, match="another backbone"):
        registry.load("bound", fingerprint="00")
    registry.load("bound", fingerprint="f1" * 32)


def test_a_version_keeps_fingerprints_of_its_pictures_and_some_others(
    registry: Registry, tmp_path: Path, category: Category
) -> None:
    support = category.support_set(3, seed=0)
    others = tuple(path for path in category.good if path not in support)
    assert len(others) > 8
    registered = registry.register(
        make_prompt_set("pictured"), pictures={}, trials=[], support=support, held_out=others
    )
    data = registry.download(registered, "data.json", tmp_path)
    assert data is not None
    fingerprints = json.loads(data.read_text())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in category.good}
    assert fingerprints["support"] == {path.name: digests[path.name] for path in support}
    assert len(fingerprints["held_out"]) == len(others)
    kept = registry.download(registered, "held_out", tmp_path)
    assert kept is not None
    names = {path.stem for path in kept.iterdir()}
    assert len(names) == 8
    assert names <= {digests[path.name] for path in others}
    assert len(registered.tags["data_hash"]) == 64
    assert registry.download(registered, "absent.json", tmp_path) is None


def test_history_tells_each_move_and_one_by_hand(registry: Registry, set_alias: SetAlias) -> None:
    register(registry, "moved", versions=3)
    made = registry.move(registry.history("moved"), 2, action="promote", why="better")
    set_alias("moved", CHAMPION, 1)
    history = registry.history("moved")
    assert (history.champion, history.candidate, history.recorded) == (1, 3, 2)
    assert [(move.action, move.source, move.target) for move in history.moves] == [
        ("first", None, 1),
        ("promote", 1, 2),
        ("by hand", 2, 1),
    ]
    assert history.moves[1] == made
    assert (made.number, made.why) == (2, "better")
    registry.move(history, 3, action="promote", why="newest")
    history = registry.history("moved")
    assert [move.number for move in history.moves] == [1, 2, 3, 4]
    assert history.earlier() == [1, 2]


def test_of_moves_at_once_one_wins_and_the_others_are_told(registry: Registry) -> None:
    register(registry, "race", versions=4)
    seen = registry.history("race")
    outcomes: list[object] = []
    start = threading.Barrier(3)

    def attempt(version: int) -> None:
        start.wait()
        try:
            outcomes.append(registry.move(seen, version, action="promote", why="mine"))
        except RegistryConflictError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attempt, args=(version,)) for version in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [outcome for outcome in outcomes if isinstance(outcome, Move)]
    told = [str(outcome) for outcome in outcomes if isinstance(outcome, RegistryConflictError)]
    assert len(told) == 2
    assert all("look at the history" in message for message in told)
    assert registry.champions()["race"] == won.target
    assert [move.target for move in registry.history("race").moves] == [1, won.target]
    # What was seen before is stale for ever.
    with pytest.raises(RegistryConflictError, match=f"made version {won.target} the champion"):
        registry.move(seen, 3, action="promote", why="late")


def test_a_candidate_can_be_withdrawn_and_says_why(registry: Registry) -> None:
    register(registry, "withdrawn", versions=3)
    with pytest.raises(RegistryConflictError, match="2 of withdrawn is no longer the candidate"):
        registry.withdraw("withdrawn", 2)
    discarded = discard(registry, "withdrawn", why="blurred images")
    assert (discarded.version, discarded.aliases) == (3, ())
    assert discarded.tags["discarded"] == "blurred images"
    assert registry.aliases()["withdrawn"] == {CHAMPION: 1}
    with pytest.raises(RegistryError, match="no version or alias 'candidate'"):
        discard(registry, "withdrawn", why="again")
    register(registry, "alone")
    with pytest.raises(RegistryError, match="is the champion"):
        discard(registry, "alone", why="why not")
    registered = registry.resolve("alone")
    age = datetime.now(timezone.utc) - datetime.fromisoformat(registered.created)
    assert age < timedelta(minutes=5)


def test_diff_names_what_differs(registry: Registry) -> None:
    register(registry, "diff", versions=2)
    differences = {name: (left, right) for name, left, right in registry.diff("diff")}
    assert differences["seed"] == ("0", "1")
    assert differences["version"] == ("1", "2")
    assert "sha256" in differences
    assert not {"context_length", "validation"} & set(differences)


def test_what_a_person_decides_of_a_threshold_is_kept_until_the_next_decision(
    registry: Registry,
) -> None:
    register(registry, "judged")
    assert registry.categories()["judged"].threshold is None
    for value, reason in ((0.41, "dust on the lens"), (None, "it is clean, süß")):
        said = OperatorThreshold(value=value, reason=reason, by="shift-2", at="2025-01-01T00:00:00")
        registry.set_threshold("judged", said)
        assert registry.categories()["judged"].threshold == said
    assert registry.categories()["judged"].aliases == {CHAMPION: 1, CANDIDATE: 1}
    with pytest.raises(RegistryError, match="no category 'absent'"):
        registry.set_threshold("absent", said)


def test_annotations_stay_with_their_version(registry: Registry) -> None:
    register(registry, "noted", versions=2)
    version = registry.resolve("noted", "2")
    for name, verdict in (("first", "kept"), ("second", "promoted")):
        registry.annotate(version, {"verdict": verdict}, report=f"### {verdict}", name=name)
    assert registry.resolve("noted", "2").tags["verdict"] == "promoted"
    assert "verdict" not in registry.resolve("noted", "1").tags


def test_the_number_of_a_deleted_version_is_not_given_again(registry: Registry) -> None:
    register(registry, "gone", versions=3)
    registry.delete("gone", 3)
    registry.delete("gone", 2)
    assert registry.versions("gone") == [1]
    with pytest.raises(RegistryError):
        registry.delete("gone", 2)
    with pytest.raises(RegistryError, match="no version or alias '2'"):
        registry.resolve("gone", "2")
    register(registry, "gone")
    assert registry.aliases()["gone"] == {CHAMPION: 1, CANDIDATE: 4}


def test_a_trial_that_is_logged_again_is_kept_once(registry: Registry) -> None:
    first = LoggedTrial(
        category="logged",
        number=0,
        settings={"noise_strength": 0.3},
        metrics={"validation": ((10, 0.5), (20, 0.75))},
        status="finished",
    )
    for trials in ([first], [first, replace(first, number=1)]):
        registry.log_trials("logged twice", trials)
    if isinstance(registry, FakeRegistry):
        kept = [f"{category}/{number}" for _, category, number in registry.trials]
    else:
        kept = logged_trials(registry.address, "logged twice")
    assert kept == ["logged/0", "logged/1"]

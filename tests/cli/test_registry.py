"""The verbs of the registry, against a real MLflow server, under each of their names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from apt_ray.cli.main import main
from apt_ray.data.feedback import Feedback, FeedbackStore
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import RegistryUnavailableError
from apt_ray.registry import open_registry, promote
from serving import fleet
from tests.registry.registering import make_prompt_set
from tuning import search


def test_the_verbs_print_what_was_decided(
    mlflow_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = open_registry(mlflow_server)
    for seed in (0, 1):
        registry.register(make_prompt_set("verbs", seed=seed), pictures={}, trials=[])
    promote(registry, "verbs", force="turn 2")

    def run(*arguments: str) -> str:
        assert main(["registry", *arguments, "--mlflow", mlflow_server]) == 0
        return capsys.readouterr().out

    assert run("rollback", "verbs", "--reason", "too strict") == "verbs: version 2 -> 1\n"
    history = run("history", "verbs")
    rows = history.splitlines()
    assert len(rows) == 4
    assert rows[-1].split()[-6:] == ["rollback", "2", "->", "1", "too", "strict"]
    assert [line for line in run("diff", "verbs").splitlines() if line.startswith("seed ")]
    report = run("promote", "verbs", "--force", "--reason", "it was right")
    assert "against champion 1: uncomparable" in report
    assert "Promoted in any case: it was right" in report
    assert run("prune", "verbs", "--keep", "1", "--days", "0") == "verbs: version 1\n"

    assert fleet.main(["history", "verbs", "--mlflow", mlflow_server]) == 0
    assert capsys.readouterr().out.startswith(history)
    assert fleet.main(["promote", "verbs", "--version", "1", "--mlflow", mlflow_server]) == 3
    assert "uncomparable" in capsys.readouterr().out
    assert main(["registry", "rollback", "absent", "--mlflow", mlflow_server]) == 1
    assert "no category 'absent'" in capsys.readouterr().err


def test_what_waits_is_registered(
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("APT_RAY_PENDING", str(tmp_path))
    away = open_registry("http://127.0.0.1:1")
    commands = ((main, ["registry", "pending"]), (search.main, ["--register-pending"]))
    for run, arguments in commands:
        with pytest.raises(RegistryUnavailableError, match="apt-ray registry pending"):
            away.register(make_prompt_set("waits"), pictures={}, trials=[], pending=tmp_path)
        assert run([*arguments, "--mlflow", away.address]) == 1
        assert "no MLflow server answers" in capsys.readouterr().err
        assert run([*arguments, "--mlflow", mlflow_server]) == 0
        said = capsys.readouterr().out
        assert "waits: registered version" in said
        assert f"1 versions registered; none waits in {tmp_path}" in said


@pytest.mark.parametrize(
    "flags",
    [
        *(["--days", days] for days in ("nan", "inf", "-inf", "-1", "1e9", "soon")),
        *(["--keep", keep] for keep in ("0", "-3", "nan", "1.5")),
    ],
)
@pytest.mark.parametrize("program", [lambda line: main(["registry", *line]), fleet.main])
def test_prune_takes_no_numbers_that_mean_nothing(
    program: Callable[[list[str]], int], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program(["prune", *flags])
    assert f"argument {flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("program", [lambda line: main(["registry", *line]), fleet.main])
def test_whoever_forces_says_why(
    program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program(["promote", "verbs", "--force"])
    assert "--reason" in capsys.readouterr().err


def test_feedback_of_a_fleet_joins_the_memory(
    mlflow_server: str,
    prompt_set: PromptSet,
    category: Category,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strict = prompt_set.with_threshold(prompt_set.threshold.moved_to(0.01))
    registry = open_registry(mlflow_server)
    registry.register(strict.with_category("says"), pictures={}, trials=[])
    good = next(image.path for image in category.test if not image.is_anomalous)
    said = Feedback(
        category="says",
        request_id="part-7",
        label="false_alarm",
        by="line-3",
        width=8,
        height=8,
        source="caller",
    )
    given = FeedbackStore(tmp_path).give(said, good.read_bytes(), "png")
    command = ["registry", "accept", "says", "--reason", "glare", "--mlflow", mlflow_server]
    assert main([*command, "--feedback", str(tmp_path), "--callers", "2"]) == 1
    assert "1 of 2 callers say so" in capsys.readouterr().err
    assert main([*command, "--feedback", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert given.id in told
    assert told.endswith("says: version 1 -> 2\n")
    tags = registry.resolve("says").tags
    assert (tags["feedback_by"], tags["gate"]) == ("line-3", "promoted")
    assert registry.history("says").moves[-1].action == "accept"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name an IMAGE"),
        (["--feedback", "kept", "--defects", "scratch.png"], "leave --defects out"),
    ],
)
def test_accept_needs_images_or_feedback(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["registry", "accept", "says", "--reason", "glare", *flags])
    assert message in capsys.readouterr().err

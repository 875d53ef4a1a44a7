"""The settings of a search, and the flags that are made of them."""

from pathlib import Path
from typing import Any

import pytest

from apt_ray.config import BackboneSpec
from tuning.search import read_command
from tuning.settings import EngineSettings, SearchSettings
from tuning.space import Axis

SPACE = "smgs_weight: {low: 0, high: 1}\n"

SEARCH_FLAGS: dict[str, tuple[str, Any]] = {
    "shots": ("--shots 2", 2),
    "support_seeds": ("--seeds 3,4", (3, 4)),
    "trials": ("--trials 5", 5),
    "live_trials": ("--live-trials 3", 3),
    "searcher": ("--searcher optuna", "optuna"),
    "warm_start": ("--warm-start 3", 3),
    "scheduler": ("--scheduler none", "none"),
    "objective": ("--searcher optuna --scheduler none --objective pareto", "pareto"),
    "steps": ("--max-steps 16", 16),
    "time_budget_s": ("--time-budget 2.5", 2.5),
    "seed": ("--seed 7", 7),
    "promote": ("--promote never", "never"),
    "ground": ("--ground black", "black"),
    "white_level": ("--white-level 4095", 4095),
    "space": ("--space FOLDER/space.yaml", {"smgs_weight": Axis(low=0, high=1)}),
    "backbone": ("--backbone ViT-B-16 --tiles 2", BackboneSpec(name="ViT-B-16", tiles=2)),
}
ENGINE_FLAGS: dict[str, tuple[str, Any]] = {
    "mode": ("--engine shared", "shared"),
    "gpus": ("--engine-gpus 0.25", 0.25),
    "threads": ("--engine-threads 3", 3),
    "bank_cache": ("--bank-cache /banks", "/banks"),
}


@pytest.mark.parametrize("field", SearchSettings.model_fields)
def test_every_setting_of_a_search_has_a_flag(field: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    flags, value = SEARCH_FLAGS[field]
    given = flags.replace("FOLDER", str(tmp_path)).split()
    settings = read_command(["--data", ".", *given]).settings
    assert getattr(settings, field) == value
    assert getattr(SearchSettings(), field) != value


@pytest.mark.parametrize("field", EngineSettings.model_fields)
def test_every_setting_of_the_engines_has_a_flag(field: str) -> None:
    flags, value = ENGINE_FLAGS[field]
    assert getattr(read_command(["--data", ".", *flags.split()]).engine, field) == value
    assert getattr(EngineSettings(), field) != value


def test_what_is_not_given_has_its_default() -> None:
    command = read_command(["--data", "."])
    assert command.settings == SearchSettings()
    assert command.engine == EngineSettings()


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--steps 16", "steps", 16),
        ("--seeds 5", "support_seeds", (5,)),
        ("--seeds 5 6", "support_seeds", (5, 6)),
        ("--reference-layers 1,2 3", "backbone", BackboneSpec(reference_layers=(1, 2, 3))),
    ],
)
def test_other_spellings_are_understood(flags: str, field: str, value: object) -> None:
    settings = read_command(["--data", ".", *flags.split()]).settings
    assert getattr(settings, field) == value


def test_no_cache_of_banks_is_not_the_default_one() -> None:
    assert read_command(["--data", ".", "--bank-cache", ""]).engine.bank_cache == ""


def test_the_help_tells_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read_command(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--max-steps STEPS, --steps STEPS Optimisation steps" in shown
    assert "fitted to the first. (0,1,2)" in shown
    assert "(None)" not in shown

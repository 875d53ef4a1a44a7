"""What a search will take, counted and timed with the built-in backbone."""

import json
from pathlib import Path

import pytest

from apt_ray.data.folders import find_categories
from tuning.estimate import Estimate, Machines, estimate
from tuning.search import main
from tuning.settings import EngineSettings, SearchSettings
from tuning.space import Axis

SETTINGS = SearchSettings(
    shots=2,
    support_seeds=(0, 1),
    trials=4,
    steps=8,
    space={
        "smgs_weight": Axis(low=0.0, high=1.0),
        "region": Axis(choices=("random", "everywhere")),
        "reference_input_size": Axis(choices=(256, 320)),
    },
)


@pytest.fixture(scope="module")
def estimated(sample_data: Path) -> Estimate:
    machines = Machines(cpus=2, gpus=0, name="two")
    return estimate(find_categories(sample_data), SETTINGS, EngineSettings(), machines)


def test_it_counts_what_the_search_will_make(estimated: Estimate) -> None:
    assert estimated.banks == 3 * 2 * 2  # categories, support sets, places of noise
    assert estimated.judges == 3 * 2 * 2  # ... sizes that the memory reads
    assert (estimated.trials, estimated.lanes, estimated.workers) == (12, 4, 2)
    assert estimated.encoded_mib > 1


def test_it_times_the_parts(estimated: Estimate) -> None:
    assert min(estimated.encoding_s, estimated.training_s, estimated.fitting_s) > 0
    assert estimated.share == 0.5
    assert 0 < estimated.clock_s(0.5) <= estimated.clock_s(1.0)
    shown = str(estimated)
    assert "12 support banks and 12 judges" in shown
    assert "12 of 4 lanes, 2 compute at a time" in shown


def test_a_dry_run_needs_no_ray_and_leaves_nothing(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--shots", "2", "--seeds", "0", "--steps", "4", "--trials", "1")
    space = tmp_path / "space.yaml"
    space.write_text("smgs_weight: {low: 0, high: 1}\n")
    storage = tmp_path / "storage"
    data = ("--data", str(sample_data), "--storage", str(storage), "--space", str(space))
    told = tmp_path / "told" / "estimate.json"
    assert main(["--dry-run", *data, *flags, "--progress", str(told)]) == 0
    assert "by the clock" in capsys.readouterr().out
    assert not storage.exists()
    figures = json.loads(told.read_text())["estimate"]
    assert 0 < figures["least_s"] <= figures["most_s"] <= figures["cpu_s"]
    assert (figures["gpu_s"], figures["gpus"]) == (0, 0)


def test_a_dry_run_is_of_a_new_search(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dry-run", "--resume", "some"])
    assert "--dry-run needs --data" in capsys.readouterr().err

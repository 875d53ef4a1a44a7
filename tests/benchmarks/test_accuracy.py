import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apt_ray.errors import DataError
from apt_ray.validation.intervals import change_over_seeds
from benchmarks.accuracy import main
from benchmarks.ledger import Ledger, Row
from benchmarks.tables import format_claims, format_rows

ROW = Row(
    method="apt",
    category="tile",
    shots=4,
    seed=0,
    image_auroc=0.9,
    pixel_auroc=None,
    aupro=None,
    good_rejected=0.25,
    defects_found=None,
    fit_seconds=1.5,
    image_ms=20.0,
)


def run(data: Path, *options: str) -> int:
    name = min(data.iterdir()).name
    return main(
        ["--data", str(data), "--categories", name, "--shots", "1", "--threads", "1", *options]
    )


def test_a_stopped_run_goes_on_where_it_was(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    some = ["--methods", "memory", "handwritten", "--json", str(file)]
    assert run(sample_data, *some, "--seeds", "0", "--published", "mvtec") == 0
    printed = capsys.readouterr().out
    assert "| 1 | **published** | PromptAD | 94.6 | 95.9 | - | - | - | - | - |\n" in printed
    first = json.loads(file.read_text())
    assert {row["method"] for row in first} == {"memory", "handwritten", "handwritten-alone"}
    assert set(first[0]) == {
        "method",
        "category",
        "shots",
        "seed",
        "image_auroc",
        "pixel_auroc",
        "aupro",
        "good_rejected",
        "defects_found",
        "fit_seconds",
        "image_ms",
        "peak_mb",
    }
    assert all(0 < row["image_auroc"] <= 1 and row["image_ms"] > 0 for row in first)
    # As if it had been stopped between two methods.
    file.write_text(json.dumps([row for row in first if row["method"] != "memory"]))
    assert run(sample_data, *some, "--seeds", "0,1") == 0
    again = json.loads(file.read_text())
    assert len(again) == 6
    # Seconds never repeat themselves: what was finished was not done again.
    assert [row for row in first if row["method"] != "memory"] == again[:2]
    capsys.readouterr()
    assert run(sample_data, *some, "--input-size", "160") == 1
    assert "made with another backbone: give another --json FILE" in capsys.readouterr().err


def test_claims_need_an_interval_away_from_zero(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows.json", {})
    rng = np.random.default_rng(0)
    for seed in range(3):
        noise_R = rng.normal(scale=0.01, size=101)
        for method, gain in {"apt": 0.1, "memory": 0.0, "subspace": 0.099}.items():
            own_R = rng.normal(scale=0.002, size=101)
            values_R = 0.7 + gain + noise_R + own_R
            values_R[0] = 0.7 + gain
            row = replace(ROW, method=method, seed=seed, image_auroc=0.7 + gain)
            ledger.add(row, {"image_auroc": values_R})
    ledger.add(replace(ROW, method="apt", category="solo"), {})
    hardest, easiest = format_claims(ledger).splitlines()[2:]
    assert hardest.startswith("| 4 | apt | subspace | image AUROC | 79.9 | 80.0 | +0.1 (-")
    assert hardest.endswith("| no difference shown |")
    assert easiest.startswith("| 4 | apt | memory | image AUROC | 70.0 | 80.0 | +10.0 (+")
    assert easiest.endswith("| better |")
    table = format_rows(ledger)
    assert "| 4 | tile | apt | 80.0 ± 0.0 | - | - | 25.0 ± 0.0 | - | 1.5 | 20.0 |" in table
    assert "| 4 | **mean** | apt |" in table


def test_seeds_widen_the_interval_and_categories_count_alike() -> None:
    same = np.full(201, 0.5)
    rising = [np.full(201, value) for value in (0.5, 0.6, 0.7)]
    interval = change_over_seeds([[same] * 3, [same]], [rising, [same]])
    assert interval.before == pytest.approx(0.5)
    assert interval.after == pytest.approx(0.55)
    assert interval.low == pytest.approx(0.0)
    assert interval.high == pytest.approx(0.1)
    assert interval.verdict == "no difference shown"
    assert change_over_seeds([rising], [[same] * 3]).high <= 0
    assert change_over_seeds([[same]], [[same + 0.1]]).verdict == "better"
    assert change_over_seeds([[same]], [[same - 0.1]]).verdict == "worse"


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[{}]")
    with pytest.raises(DataError, match="not what this benchmark wrote"):
        Ledger(file, {})
    good = tmp_path / "good.json"
    ledger = Ledger(good, {"data": "a"})
    ledger.add(ROW, {"image_auroc": np.ones(3)})
    assert Ledger(good, {"data": "a"}).rows == ledger.rows
    with pytest.raises(DataError, match="made with another data"):
        Ledger(good, {"data": "b"})
    # A row of before the shares at the threshold: it cannot be said what they were.
    (row,) = json.loads(good.read_text())
    del row["good_rejected"]
    good.write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"good_rejected.*give another --json FILE"):
        Ledger(good, {"data": "a"})

import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks.rows import compared, write_rows

FOLDER = Path(benchmarks.__file__).parent
# They keep what is finished, to go on there, report on files, or on each minute.
OWN_FORM = {"ledger.py", "fuzz.py", "metric_head.py", "search_worth.py", "soak.py"}


def test_the_ratio_says_how_many_times_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        compared("latency", 5.0, 10.0, "ms"),
        compared("rate", 5.0, 10.0, "images/s", more_is_better=True),
    ]
    assert [row["ratio"] for row in rows] == [2.0, 0.5]
    write_rows(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert "| latency | 5 | 10 | 2.00 | ms |" in capsys.readouterr().out


def test_every_benchmark_writes_rows() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        if path.name not in OWN_FORM | {"rows.py"}:
            assert "write_json" not in text, path.name
            assert "json.dump(" not in text, path.name
        if '"--json"' in text:
            written = ("write_rows(", "Ledger(options.json", "write_json(options.json")
            assert any(by in text for by in written), path.name

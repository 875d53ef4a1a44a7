"""serving.bulk.results: rows, sums and what is finished."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import DataError, WriteError
from serving.bulk.results import BINS, SCHEMA, Output, Tally, tally_rows, to_rows
from serving.bulk.versions import Version


def row(path: str, score: float | None, **fields: Any) -> dict[str, Any]:
    return {
        "path": path,
        "category": "bottle",
        "threshold": 0.5,
        "anomaly_score": score,
        "is_anomalous": None if score is None else score > 0.5,
        "error": "damaged" if score is None else None,
        **fields,
    }


@pytest.fixture
def version(prompt_set: PromptSet) -> Version:
    return Version(
        category="bottle",
        number=3,
        prompt_set=prompt_set.with_category("bottle"),
        region_of_interest=None,
        input_size=64,
    )


def test_what_has_a_row_is_finished_and_counted(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "out"))
    assert output.finished() == (set(), {})
    output.write("one", to_rows([row("/a.png", 0.1), row("/b.png", None)]))
    rows = [row("/c.tar", 1.0, member="0.jpg"), row("/a.png", 0.6, category="cable")]
    output.write("two", to_rows(rows))
    keys, tallies = output.finished()
    assert keys == {
        ("bottle", "/a.png", ""),
        ("bottle", "/b.png", ""),
        ("bottle", "/c.tar", "0.jpg"),
        ("cable", "/a.png", ""),
    }
    scores = [0] * BINS
    scores[2] = scores[-1] = 1  # 0.1 begins the third bin, 1 ends the last
    assert tallies["bottle"] == Tally(images=3, rejected=1, unreadable=1, scores=scores)
    assert tallies["cable"].rejected == 1


def test_what_is_written_lies_apart_from_what_is_read(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "line" / "out"))
    output.check_apart([str(tmp_path / "line" / "images"), str(tmp_path / "line" / "out2")])
    for place in (tmp_path / "line", tmp_path / "line" / "out"):
        with pytest.raises(DataError, match="taken for images by the next run: name another"):
            output.check_apart([str(place)])
    with pytest.raises(DataError, match="next run"):
        Output.at("s3://line/images/out").check_apart(["s3://line/images"])


def test_errors_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path))
    output.write("one", to_rows([row("/a.png", 0.1), row("/b.png", None)]))
    output.write("two", to_rows([row("/c.png", None)]))
    assert output.forget_errors() == 2
    keys, tallies = output.finished()
    assert keys == {("bottle", "/a.png", "")}
    assert tallies["bottle"].unreadable == 0
    assert output.forget_errors() == 0


def test_rows_have_their_schema_and_sums() -> None:
    rows = to_rows([row("/a.png", 0.7, regions=[])])
    assert rows.schema == SCHEMA
    assert rows["version"].to_pylist() == [None]
    assert tally_rows(rows)["bottle"].rejected == 1


def test_a_folder_keeps_to_the_versions_it_began_with(tmp_path: Path, version: Version) -> None:
    output = Output.at(str(tmp_path))
    output.check({"bottle": version})
    output.begin({"bottle": version})
    output.check({"bottle": version})
    other = replace(version, category="cable")
    output.check({"cable": other})
    output.begin({"cable": other})
    newer = replace(version, number=4, prompt_set=version.prompt_set.with_metrics({"x": 1.0}))
    with pytest.raises(DataError, match="holds what version 3 of bottle says, and now version 4"):
        output.check({"bottle": newer})
    stricter = replace(newer, number=3)
    with pytest.raises(DataError, match="by another threshold or region"):
        output.check({"bottle": stricter})


def test_what_is_damaged_or_foreign_is_said(tmp_path: Path, version: Version) -> None:
    output = Output.at(str(tmp_path))
    output.write("one", to_rows([]))
    with pytest.raises(DataError, match=r"no batch\.json that says whose"):
        output.check({"bottle": version})
    (tmp_path / "batch.json").write_text("{}")
    with pytest.raises(DataError, match="was not written by this version"):
        output.check({"bottle": version})
    (tmp_path / "inspections" / "one.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"is damaged .* delete it"):
        output.finished()
    blocked = Output.at(str(tmp_path / "batch.json"))
    with pytest.raises(WriteError, match="cannot write"):
        blocked.write("one", to_rows([]))

"""serving.bulk.inputs: folders, lists and archives as one table of inputs."""

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apt_ray.errors import DataError
from serving.bulk.inputs import Input, digest, find_inputs, from_table, to_table


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())


def test_a_folder_gives_its_images_each_once_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "1.PNG", tmp_path / "a.jpg", tmp_path / "notes.txt")
    touch(tmp_path / ".hidden.png", tmp_path / "@eaDir" / "a.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.png").symlink_to(tmp_path / "a.jpg")
    names = [str(tmp_path), str(tmp_path / "a.jpg")]
    found = find_inputs(names, category="bottle")
    wanted = [str(tmp_path / name) for name in ("a.jpg", "b/1.PNG", "linked.png")]
    assert [each.path for each in found] == wanted
    assert {each.category for each in found} == {"bottle"}
    assert found[0].read() == b"a.jpg"


def test_a_list_names_paths_and_categories(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "1.png"
    rows = {
        "file": [str(elsewhere), "2.png", "s3://line/3.png"],
        "product": ["cable", "bottle", "cable"],
    }
    pq.write_table(pa.table(rows), tmp_path / "list.parquet")
    columns = {"category_column": "product", "path_column": "file"}
    found = find_inputs([str(tmp_path)], **columns)  # type: ignore[arg-type]
    assert [(each.category, each.path) for each in found] == [
        ("bottle", str(tmp_path / "2.png")),
        ("cable", str(elsewhere)),
        ("cable", "s3://line/3.png"),
    ]
    named = find_inputs([str(tmp_path / "list.parquet")], category="one", path_column="file")
    assert {each.category for each in named} == {"one"}


def test_an_archive_is_read_in_place(tmp_path: Path) -> None:
    files = {
        "shard/000.jpg": b"first",
        "shard/000.json": json.dumps({"category": "cable"}).encode(),
        "shard/001.json": json.dumps({"category": "bottle"}).encode(),
        "shard/001.front.png": b"second",
        "shard/001.cls": b"7",
    }
    write_archive(tmp_path / "part.tar", files)
    found = find_inputs([str(tmp_path)], category_column="category")
    assert [(each.category, each.member, each.read()) for each in found] == [
        ("bottle", "shard/001.front.png", b"second"),
        ("cable", "shard/000.jpg", b"first"),
    ]
    (tmp_path / "part.tar").write_bytes((tmp_path / "part.tar").read_bytes()[:514])
    with pytest.raises(DataError, match=r"part\.tar ends within shard/000\.jpg"):
        found[1].read()


def test_a_table_gives_back_what_it_was_given(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")  # no text
    inputs = [Input("bottle", f"/x/{name}"), Input("bottle", "/x/a.tar", "0.jpg", 512, 9)]
    assert from_table(to_table(inputs)) == inputs
    assert from_table(to_table(inputs).slice(1, 1)) == inputs[1:]
    assert inputs[0].key == ("bottle", "/x/\\udcff.png", "")
    assert len({digest(inputs, ""), digest(inputs[1:], ""), digest(inputs, "x")}) == 3


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a.png", tmp_path / "a.zip", tmp_path / "bad.tar")
    touch(tmp_path / "bad.parquet")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"path": ["a.png"], "kind": [None]}), tmp_path / "list.parquet")
    write_archive(tmp_path / "bare.tar", {"0.jpg": b"x"})
    wrong = {
        "absent": "there is no .*absent",
        "empty": "no image in .*empty",
        "a.zip": "a.zip is no folder, no image",
        "bad.tar": "cannot read the archive .*bad.tar",
        "bad.parquet": "cannot read the list .*bad.parquet",
        "images": "says nothing of its category: give --category",
        "list.parquet": "no column 'category', but path, kind",
        "bare.tar": "names no category",
    }
    for name, message in wrong.items():
        with pytest.raises(DataError, match=message):
            find_inputs([str(tmp_path / name)], category_column="category")
    with pytest.raises(DataError, match=r"list\.parquet, a\.png names no category in 'kind'"):
        find_inputs([str(tmp_path / "list.parquet")], category_column="kind")

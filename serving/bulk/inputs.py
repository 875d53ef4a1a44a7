"""What a batch inspects: images in folders, in archives and in lists, as one table.

An archive is a tar file in WebDataset's layout: images, and beside each, if it says more of it, a
JSON file of the same key (`000123.jpg`, `000123.json`). It is read by place: its headers once, to
know what it holds, and then each image where it lies. Ray Data's own reader hands out the files of
an archive from the first to the last, so that whoever begins again would have to read all of it.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from apt_ray.config import CATEGORY_NAME
from apt_ray.errors import DataError
from apt_ray.files import Location, absolute, files_below, open_file, read_file, read_part
from apt_ray.images import IMAGE_SUFFIXES

Key = tuple[str, str, str]
"""Category, path, and name within the archive, empty where it is none."""

_SCHEMA = pa.schema(
    [
        ("category", pa.string()),
        ("path", pa.binary()),  # file names are bytes
        ("member", pa.string()),
        ("start", pa.int64()),
        ("size", pa.int64()),
    ]
)
_LIST = ".parquet"
_ARCHIVE = ".tar"
# Of S3, at once: photographs are passed over, small images are read along.
_AHEAD = 2**18
_READERS = 16


class Input(NamedTuple):
    """One image that is to be inspected: a tuple, for there are millions of them.

    Attributes:
        path: of the file, or of the archive.
        member: its name within the archive; empty if it is a file.
        start, size: where it lies in the archive; the size is -1 of a file.
    """

    category: str
    path: str
    member: str = ""
    start: int = 0
    size: int = -1

    @property
    def key(self) -> Key:
        return self.category, readable(self.path), self.member

    @property
    def source(self) -> str:
        """Names it in messages."""
        return f"{self.path}/{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """The bytes of the image; DataError if they cannot be read."""
        if self.size < 0:
            return read_file(self.path)
        data = read_part(self.path, self.start, self.size)
        if len(data) < self.size:
            raise DataError(f"{self.path} ends within {self.member}: copy it again")
        return data


def readable(path: str) -> str:
    """The path as UTF-8, with escapes of bytes that are none."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def find_inputs(
    places: Sequence[str],
    *,
    category: str | None = None,
    category_column: str | None = None,
    path_column: str = "path",
) -> list[Input]:
    """All images of folders, archives, lists and single files, each once, sorted by its key.

    Args:
        places: local ones, or `s3://`. Of a folder its images and archives count, or, if it holds
            neither, its lists. Paths in a list are meant from where the list lies.
        category: of all of them.
        category_column: where a list, or the JSON file of an image in an archive, names it instead.
        path_column: of a list.

    Raises:
        DataError: nothing is there, a list or an archive cannot be read, or an image is given
            without a category.
    """
    naming = _Naming(category, category_column, path_column)
    with ThreadPoolExecutor(_READERS) as readers:
        found = sorted(_found(places, naming, readers))
    if not found:
        raise DataError(f"no image in {', '.join(places)}: give files or other folders")
    return [each for each, before in zip(found, [None, *found], strict=False) if each != before]


def to_table(inputs: Iterable[Input]) -> pa.Table:
    """Inputs as a table, of which tasks elsewhere read no more than their part."""
    rows = [(i.category, os.fsencode(i.path), i.member, i.start, i.size) for i in inputs]
    columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
    return pa.table(
        [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def from_table(table: pa.Table) -> list[Input]:
    """What `to_table` was given."""
    return [
        Input(category, os.fsdecode(path), member, start, size)
        for category, path, member, start, size in zip(
            *(column.to_pylist() for column in table.columns), strict=True
        )
    ]


def digest(inputs: Iterable[Input], salt: str) -> str:
    """Changes with the inputs and with `salt`."""
    found = hashlib.sha256(salt.encode())
    for each in inputs:
        found.update("\0".join(each.key).encode())
        found.update(b"\n")
    return found.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Naming:
    category: str | None
    column: str | None
    path_column: str

    def of(self, said: object, source: str) -> str:
        """The category of an image of which `said` is said; DataError if there is none."""
        name = self.category or ("" if said is None else str(said))
        if not re.fullmatch(CATEGORY_NAME, name):
            what = f"names the category {name!r}" if name else "names no category"
            raise DataError(
                f"{source} {what} in {self.column!r}: give one of letters, digits, - and _, or"
                f" --category for all images"
            )
        return name


def _found(places: Sequence[str], naming: _Naming, readers: ThreadPoolExecutor) -> Iterator[Input]:
    for place in map(absolute, places):
        archives: list[str] = []
        lists: list[str] = []
        if place.is_dir():
            has_images = False
            for path in files_below(place):
                kind = PurePosixPath(path).suffix.lower()
                if kind in IMAGE_SUFFIXES:
                    has_images = True
                    yield _file(path, naming)
                elif kind == _ARCHIVE:
                    archives.append(path)
                elif kind == _LIST:
                    lists.append(path)
            if has_images or archives:
                lists = []
        elif not place.is_file():
            raise DataError(f"there is no {place}: check the path")
        elif place.suffix.lower() == _LIST:
            lists = [str(place)]
        elif place.suffix.lower() == _ARCHIVE:
            archives = [str(place)]
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            yield _file(str(place), naming)
        else:
            raise DataError(
                f"{place} is no folder, no image, no .parquet and no .tar: give one of these, an"
                f" archive not compressed"
            )
        for path in lists:
            yield from _listed(absolute(path), naming)
        for inputs in readers.map(lambda path: list(_packed(path, naming)), archives):
            yield from inputs


def _file(path: str, naming: _Naming) -> Input:
    if naming.category is None:
        raise DataError(f"{path} says nothing of its category: give --category")
    return Input(naming.category, path)


def _listed(path: Location, naming: _Naming) -> Iterator[Input]:
    """The images that a Parquet file names."""
    wanted = [naming.path_column, *([naming.column] if naming.column else [])]
    try:
        with open_file(path, ahead=_AHEAD) as content, pq.ParquetFile(content) as file:
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path} has no column {' and no '.join(map(repr, missing))}, but"
                    f" {', '.join(file.schema_arrow.names)}: name it with --path-column or"
                    f" --category-column"
                )
            for batch in file.iter_batches(columns=wanted):
                columns = [batch.column(name).to_pylist() for name in wanted]
                for number, text in enumerate(columns[0]):
                    if not isinstance(text, str) or not text:
                        raise DataError(f"{path} has a row without a path: fill it, or drop it")
                    inside = text.startswith("s3://") or Path(text).is_absolute()
                    image = text if inside else str(path.parent / text)
                    said = columns[1][number] if naming.column else None
                    yield Input(naming.of(said, f"{path}, {text}"), image)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read the list {path} ({error}): write it again") from error


def _packed(path: str, naming: _Naming) -> Iterator[Input]:
    """The images in an archive, each with the category that the JSON file of its key names."""
    images: list[tuple[str, int, int]] = []
    notes: dict[str, object] = {}
    try:
        with (
            open_file(path, ahead=_AHEAD) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            for member in archive:
                kind = PurePosixPath(member.name).suffix.lower()
                if not member.isfile():
                    continue
                if kind in IMAGE_SUFFIXES:
                    images.append((member.name, member.offset_data, member.size))
                elif kind == ".json" and naming.column:
                    content = archive.extractfile(member)
                    assert content is not None
                    note = json.loads(content.read())
                    notes[_key(member.name)] = (
                        note.get(naming.column) if isinstance(note, dict) else None
                    )
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise DataError(
            f"cannot read the archive {path} ({error}): it must be a whole tar file, not compressed"
        ) from error
    for name, start, size in images:
        said = notes.get(_key(name))
        yield Input(naming.of(said, f"{path}/{name}"), path, name, start, size)


def _key(name: str) -> str:
    """What the files of one sample share: all before the first point of their names."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]

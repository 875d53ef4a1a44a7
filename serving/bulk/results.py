"""What comes of a batch: Parquet files below one folder, and the sums over them.

    OUT/batch.json              which version inspects each category, the same from run to run
    OUT/inspections/<id>.parquet  one file a block, whole or not there
    OUT/overlays/<category>/<id>.png
    OUT/summary.json            what the last run said at its end

What is finished is what has a row. So a run that goes on after another reads the rows that are
there, and cuts what is left into blocks. A block's file is named after its images: a task that
runs twice writes the same file twice. Ray Data's own `write_parquet` names files after its tasks,
and a task that is tried again, or a run that goes on, leaves rows twice.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from apt_ray.detection.detector import Region
from apt_ray.errors import DataError
from apt_ray.files import (
    Location,
    S3Path,
    absolute,
    check_writable,
    files_below,
    is_within,
    open_file,
    put,
    read_file,
)
from serving.bulk.inputs import Key
from serving.bulk.versions import Version

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("category", pa.string(), nullable=False),
        pa.field("version", pa.int32()),
        pa.field("anomaly_score", pa.float64()),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("is_anomalous", pa.bool_()),
        pa.field("p_value", pa.float64()),
        pa.field(
            "regions",
            pa.list_(
                pa.struct(
                    [
                        *((name, pa.int32()) for name in ("x", "y", "width", "height")),
                        ("peak", pa.float64()),
                        ("area", pa.int64()),
                    ]
                )
            ),
        ),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("overlay", pa.string()),
        pa.field("error", pa.string()),
    ]
)
"""The columns of `inspections`; docs/operating.md says what each holds."""

BINS = 20
"""Of the histogram of scores, over 0..1."""

_FORMAT = 1
_READERS = 16
_AHEAD = 2**20


@dataclass(kw_only=True, slots=True)
class Tally:
    """Sums over images of one category.

    Attributes:
        images: all of them.
        rejected: anomalous ones.
        unreadable: those that a row says an error of.
        scores: how many scores fall into each of `BINS` equal parts of 0..1.
    """

    images: int = 0
    rejected: int = 0
    unreadable: int = 0
    scores: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, other: "Tally") -> None:
        self.images += other.images
        self.rejected += other.rejected
        self.unreadable += other.unreadable
        self.scores = [a + b for a, b in zip(self.scores, other.scores, strict=True)]


Tallies = dict[str, Tally]
"""By category."""


def add_tallies(total: Tallies, some: Tallies) -> None:
    for category, tally in some.items():
        total.setdefault(category, Tally()).add(tally)


def whole(tallies: Mapping[str, Tally]) -> Tally:
    """The sum over all categories."""
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    return total


def tally_rows(rows: pa.Table) -> Tallies:
    """The sums over rows of `SCHEMA`."""
    found: Tallies = {}
    categories, scores = rows["category"].to_pylist(), rows["anomaly_score"].to_pylist()
    for category, score, is_anomalous in zip(
        categories, scores, rows["is_anomalous"].to_pylist(), strict=True
    ):
        tally = found.setdefault(category, Tally())
        tally.images += 1
        if score is None:
            tally.unreadable += 1
        else:
            tally.rejected += is_anomalous
            tally.scores[min(BINS - 1, max(0, math.floor(score * BINS)))] += 1
    return found


def to_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def regions_of(regions: Iterable[Region]) -> list[dict[str, Any]]:
    return [asdict(region) for region in regions]


@dataclass(frozen=True, slots=True)
class Output:
    """The folder of a batch, or the prefix in S3; it can be sent to other processes."""

    folder: Location

    @classmethod
    def at(cls, place: str) -> "Output":
        return cls(absolute(place))

    def write(self, name: str, rows: pa.Table) -> None:
        """Write the rows of a block, whole. Raises WriteError."""
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer, compression="zstd")
        put(self._inspections / f"{name}.parquet", buffer.getvalue().to_pybytes())

    def write_overlay(self, category: str, name: str, png: bytes) -> str:
        """Write an overlay; returns where it lies. Raises WriteError."""
        path = self.folder / "overlays" / category / f"{name}.png"
        put(path, png)
        return str(path)

    def finished(self) -> tuple[set[Key], Tallies]:
        """What has a row, and the sums over it. Raises DataError if a file cannot be read."""
        keys: set[Key] = set()
        tallies: Tallies = {}
        with ThreadPoolExecutor(_READERS) as readers:
            for rows in readers.map(_read_rows, self._files()):
                add_tallies(tallies, tally_rows(rows))
                keys.update(_keys(rows))
        return keys, tallies

    def forget_errors(self) -> int:
        """Drop the rows that hold an error, so that their images are inspected again; returns how
        many there were. Raises DataError or WriteError."""
        dropped = 0
        for path in self._files():
            rows = _read_rows(path, columns=None)
            kept = rows.filter(pc.is_null(rows["error"]))
            if len(kept) < len(rows):
                dropped += len(rows) - len(kept)
                self.write(path.rpartition("/")[2].removesuffix(".parquet"), kept)
        return dropped

    def begin(self, versions: Mapping[str, Version]) -> None:
        """Write down which versions inspect, beside those of earlier runs. Raises WriteError."""
        said = {"format": _FORMAT, "categories": self._known() | _told(versions)}
        put(self.folder / "batch.json", (json.dumps(said, indent=2) + "\n").encode())

    def check(self, versions: Mapping[str, Version]) -> None:
        """DataError if an earlier run used another version of a category."""
        known = self._known()
        for name, version in _told(versions).items():
            before = known.get(name, version)
            if before["identity"] != version["identity"]:
                raise DataError(
                    f"{self.folder} holds what {_named(before)} of {name} says, and now"
                    f" {_named(version)} would inspect"
                    f"{' by another threshold or region' if _is_same(before, version) else ''}:"
                    f" name another --output, or go on with what it began with (--version)"
                )

    def check_writable(self) -> None:
        """WriteError if nothing can be written there; of S3 the first write tells."""
        folder = self.folder
        if not isinstance(folder, S3Path):
            check_writable(folder, is_folder=True)

    def check_apart(self, places: Iterable[str]) -> None:
        """DataError if it lies in a folder that is inspected: the next run would read it, too."""
        for place in places:
            if is_within(self.folder, place):
                raise DataError(
                    f"what is written to {self.folder} would lie in {place} and be taken for images"
                    f" by the next run: name another --output"
                )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Raises WriteError."""
        put(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def _known(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "batch.json"
        if not path.is_file():
            if self._files():
                raise DataError(
                    f"{self.folder} holds inspections, but no batch.json that says whose: name"
                    f" another --output"
                )
            return {}
        try:
            said = json.loads(read_file(path))
            if said["format"] != _FORMAT:
                raise ValueError(f"format {said['format']}")
            known: dict[str, dict[str, Any]] = said["categories"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} was not written by this version of apt-ray ({error}): name another"
                f" --output"
            ) from error
        return known

    @property
    def _inspections(self) -> Location:
        return self.folder / "inspections"

    def _files(self) -> list[str]:
        folder = self._inspections
        if not folder.is_dir():
            return []
        return [path for path in files_below(folder) if path.endswith(".parquet")]


def _read_rows(
    path: str,
    columns: Sequence[str] | None = (
        "path",
        "member",
        "category",
        "anomaly_score",
        "is_anomalous",
        "error",
    ),
) -> pa.Table:
    try:
        with open_file(path, ahead=_AHEAD) as file:
            return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is damaged ({error}): delete it, and its images are inspected again"
        ) from error


def _keys(rows: pa.Table) -> Iterable[Key]:
    members = (member or "" for member in rows["member"].to_pylist())
    return zip(rows["category"].to_pylist(), rows["path"].to_pylist(), members, strict=True)


def _told(versions: Mapping[str, Version]) -> dict[str, dict[str, Any]]:
    return {
        name: {"version": version.number, "identity": version.identity}
        for name, version in versions.items()
    }


def _named(said: Mapping[str, Any]) -> str:
    return "a file" if said["version"] is None else f"version {said['version']}"


def _is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return bool(before["version"] == now["version"] and now["version"] is not None)

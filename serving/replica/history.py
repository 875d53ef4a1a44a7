"""The history: what was inspected lately on this node, on its disk.

A SQLite file for each category holds verdicts, small images and small maps; replicas of one node
share it. One thread writes, behind the answers: what it cannot write in time, or at all, is counted
and left out.
"""

import asyncio
import hashlib
import json
import os
import queue
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import torch

from apt_ray.images import ImageLimits, decode_image, encode_jpeg
from apt_ray.levels import Reading
from apt_ray.machine import expanded
from serving.api import problems
from serving.api.history import (
    KeptCandidate,
    KeptInspection,
    KeptInspections,
    KeptPicture,
    Mark,
    Only,
    Picked,
    Wanted,
    no_history,
    unknown_inspection,
)
from serving.api.messages import InspectionReport
from serving.logs import logger
from serving.replica.meter import Meter
from serving.replica.pictures import small_map_png
from serving.settings import HistorySettings

IMAGE_SIDE = 1024
# What may wait to be written: seconds of work, and no more memory than a few large images.
_MOST_WAITING = 64
_MOST_BYTES = 64 * 2**20
_PATIENCE_S = 5.0
_PRUNE_EVERY_S = 3600.0
_MICROSECONDS = 1_000_000

_COLUMNS = (
    "id, version, score, threshold, is_anomalous, p_value, regions, request_id, width, height,"
    " mark, note, marked_by"
)
_SHOWN = f"{_COLUMNS}, candidate, candidate_score, candidate_threshold"
_BOTH = "inspections LEFT JOIN disagreements USING (id)"
_INSPECTIONS = """
CREATE TABLE IF NOT EXISTS inspections (
    id INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    score REAL NOT NULL,
    threshold REAL NOT NULL,
    is_anomalous INTEGER NOT NULL,
    p_value REAL,
    regions TEXT NOT NULL,
    request_id TEXT NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    mark TEXT,
    note TEXT NOT NULL DEFAULT '',
    marked_by TEXT NOT NULL DEFAULT '',
    image BLOB NOT NULL,
    map BLOB NOT NULL
)
"""
# In a table of its own, which files of earlier versions lack, and earlier versions do not mind.
_DISAGREEMENTS = """
CREATE TABLE IF NOT EXISTS disagreements (
    id INTEGER PRIMARY KEY,
    candidate INTEGER NOT NULL,
    candidate_score REAL NOT NULL,
    candidate_threshold REAL NOT NULL
)
"""
_DISAGREEING = "id IN (SELECT id FROM disagreements)"
_ONLY = {
    "all": "1",
    "rejected": "is_anomalous",
    "marked": "mark IS NOT NULL",
    "disagreeing": _DISAGREEING,
}
_INDEX = "CREATE INDEX IF NOT EXISTS by_request ON inspections (request_id)"
_OF_REQUEST = (
    "(SELECT count(*) FROM inspections AS others"
    " WHERE others.request_id = inspections.request_id) AS of_request"
)

Outcome = Literal["kept", "dropped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """An inspection on its way to the disk."""

    at: float
    request_id: str
    report: InspectionReport
    data: bytes
    limits: ImageLimits
    reading: Reading
    map_SS: torch.Tensor
    candidate: KeptCandidate | None


class History:
    """Keeps inspections and tells of them; a `HistoryService`.

    A number is the microsecond of its inspection, so that one node's are none of another's.

    Args:
        settings: how much is kept, and where.
        registry: address of the registry whose versions inspect: two never mix.
        disagreements: how many are kept, at the most, of those on which a candidate disagrees, also
            where others are not.
        meter: counts; None where nothing does.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: HistorySettings,
        registry: str,
        *,
        disagreements: int = 0,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._disagreements = disagreements
        key = hashlib.sha256(registry.encode()).hexdigest()[:16]
        self._folder = expanded(Path(settings.folder)) / key
        self._node = socket.gethostname()
        self._meter = meter
        self._clock = clock
        self._queue: queue.Queue[_Kept] = queue.Queue(_MOST_WAITING)
        self._bytes = 0
        self._counting = threading.Lock()
        self._has_failed = False
        self._worker: threading.Thread | None = None
        if settings.images:
            self._start()

    def keep(
        self,
        report: InspectionReport,
        *,
        request_id: str,
        data: bytes,
        limits: ImageLimits,
        reading: Reading,
        map_SS: torch.Tensor,
        candidate: KeptCandidate | None = None,
    ) -> None:
        """Keep an inspection, if there is room among those that wait; returns at once, and is
        called by one thread.

        Args:
            report: what was found.
            request_id: the name of its request.
            data, limits, reading: the image file and how it is read.
            map_SS: its anomaly map, 0..1, stretched over the image.
            candidate: what the candidate finds in it, if it was asked.
        """
        if candidate and (not self._disagreements or candidate.is_anomalous == report.is_anomalous):
            candidate = None
        if not self._settings.images and candidate is None:
            return
        self._start()
        kept = _Kept(
            at=self._clock(),
            request_id=request_id,
            report=report,
            data=data,
            limits=limits,
            reading=reading,
            map_SS=map_SS,
            candidate=candidate,
        )
        with self._counting:
            is_full = self._queue.full() or 0 < self._bytes > _MOST_BYTES - len(data)
            if not is_full:
                self._queue.put_nowait(kept)
                self._bytes += len(data)
        if is_full:
            self._count(report.category, "dropped")

    async def history(
        self, category: str, *, before: int | None, limit: int, only: Only
    ) -> KeptInspections:
        def read() -> KeptInspections:
            with self._open(category) as database:
                rows = database.execute(
                    f"SELECT {_SHOWN} FROM {_BOTH} WHERE {_ONLY[only]}"
                    " AND id >= :oldest AND (:before IS NULL OR id < :before)"
                    " ORDER BY id DESC LIMIT :limit",
                    {"oldest": self._oldest, "before": before, "limit": limit},
                ).fetchall()
            return KeptInspections(
                node=self._node, inspections=[_inspection(category, row) for row in rows]
            )

        try:
            return await asyncio.to_thread(read)
        except _NothingKeptError:
            if not self._settings.images and only != "disagreeing":
                raise no_history() from None
            return KeptInspections(node=self._node, inspections=[])

    async def history_picture(self, category: str, number: int, picture: KeptPicture) -> bytes:
        def read() -> bytes:
            with self._open(category) as database:
                row = database.execute(
                    f"SELECT {picture} FROM inspections WHERE id = ? AND id >= ?",
                    (number, self._oldest),
                ).fetchone()
            if row is None:
                raise _NothingKeptError
            data: bytes = row[picture]
            return data

        try:
            return await asyncio.to_thread(read)
        except _NothingKeptError:
            raise unknown_inspection(category, number, self._node) from None

    async def mark(self, category: str, number: int, mark: Mark, by: str) -> KeptInspection:
        def write() -> KeptInspection:
            # Without a mark there is nobody who made it.
            who = by if mark.verdict else ""
            with self._open(category) as database:
                database.execute(
                    "UPDATE inspections SET mark = ?, note = ?, marked_by = ?"
                    " WHERE id = ? AND id >= ?",
                    (mark.verdict, mark.note, who, number, self._oldest),
                )
                rows = database.execute(
                    f"SELECT {_SHOWN} FROM {_BOTH} WHERE id = ? AND id >= ?", (number, self._oldest)
                ).fetchall()
                self._prune(database)
            if not rows:
                raise _NothingKeptError
            return _inspection(category, rows[0])

        try:
            return await asyncio.to_thread(write)
        except _NothingKeptError:
            raise unknown_inspection(category, number, self._node) from None

    async def pick(self, category: str, wanted: Wanted) -> list[Picked]:
        chosen = "SELECT id FROM inspections WHERE id >= :oldest AND request_id = :request"
        if wanted.at_random:
            if not self._settings.images:
                return []  # what is kept of disagreements alone is no random sample
            # Those since which nothing was removed: some kinds stay longer than others.
            since = "".join(
                f", (SELECT CASE WHEN count(*) < {most} THEN 0 ELSE min(id) END FROM inspections"
                f" WHERE {which})"
                for which, most in self._kept_apart
                if most
            )
            chosen = (
                f"SELECT id FROM inspections WHERE version = :version AND id >= max(:oldest{since})"
                " ORDER BY random() LIMIT :some"
            )

        def read() -> list[Picked]:
            with self._open(category) as database:
                rows = database.execute(
                    f"SELECT {_SHOWN}, image, {_OF_REQUEST} FROM {_BOTH} WHERE id IN ({chosen})",
                    {
                        "oldest": self._oldest,
                        "request": wanted.request_id,
                        "some": wanted.at_random,
                        "version": wanted.version,
                    },
                ).fetchall()
            return [
                Picked(
                    inspection=_inspection(category, row, "image", "of_request"),
                    jpeg=row["image"],
                    of_request=row["of_request"],
                )
                for row in rows
            ]

        try:
            return await asyncio.to_thread(read)
        except _NothingKeptError:
            return []

    # ---- the thread that writes

    def _start(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="history", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        torch.set_num_threads(1)
        prune_at = time.monotonic()
        while True:
            if time.monotonic() >= prune_at:
                self._prune_all()
                prune_at = time.monotonic() + _PRUNE_EVERY_S
            try:
                kept = self._queue.get(timeout=max(prune_at - time.monotonic(), 0))
            except queue.Empty:
                continue
            try:
                self._write(kept)
            except Exception as error:
                self._failed(kept.report.category, error)
                self._count(kept.report.category, "failed")
            else:
                self._has_failed = False
                self._count(kept.report.category, "kept")
            with self._counting:
                self._bytes -= len(kept.data)

    def _write(self, kept: _Kept) -> None:
        report = kept.report
        image = decode_image(kept.data, limits=kept.limits, reading=kept.reading)
        width, height = image.size
        map_png = small_map_png(kept.map_SS, image.size)
        jpeg = encode_jpeg(image, side=IMAGE_SIDE)
        with self._open(report.category, is_new=True) as database:
            (number,) = database.execute(
                f"INSERT INTO inspections ({_COLUMNS}, image, map) VALUES ("
                # Two at once, or a clock that was set back: still one after the other.
                " max(:id, (SELECT coalesce(max(id) + 1, 0) FROM inspections)),"
                " :version, :score, :threshold, :is_anomalous, :p_value, :regions, :request_id,"
                " :width, :height, NULL, '', '', :image, :map) RETURNING id",
                {
                    "id": int(kept.at * _MICROSECONDS),
                    "version": report.version,
                    "score": report.anomaly_score,
                    "threshold": report.threshold,
                    "is_anomalous": report.is_anomalous,
                    "p_value": report.p_value,
                    "regions": json.dumps([region.model_dump() for region in report.regions]),
                    "request_id": kept.request_id,
                    "width": width,
                    "height": height,
                    "image": jpeg,
                    "map": map_png,
                },
            ).fetchone()
            if candidate := kept.candidate:
                database.execute(
                    "INSERT INTO disagreements VALUES (?, ?, ?, ?)",
                    (number, candidate.version, candidate.score, candidate.threshold),
                )
            self._prune(database)

    def _prune_all(self) -> None:
        """Also where nothing is inspected any more, what is too old goes."""
        for path in self._folder.glob("*.sqlite"):
            try:
                with self._open(path.stem) as database:
                    self._prune(database)
            except Exception as error:
                self._failed(path.stem, error)

    @property
    def _kept_apart(self) -> tuple[tuple[str, int], ...]:
        """Kinds of inspections, and how many of each are kept."""
        images, disagreements = self._settings.images, self._disagreements
        return (
            (f"mark IS NULL AND NOT {_DISAGREEING}", images),
            (f"mark IS NULL AND {_DISAGREEING}", disagreements),
            ("mark IS NOT NULL", max(images, disagreements)),
        )

    def _prune(self, database: sqlite3.Connection) -> None:
        database.execute("DELETE FROM inspections WHERE id < ?", (self._oldest,))
        for which, most in self._kept_apart:
            if most:  # what was kept by other settings stays
                database.execute(
                    f"DELETE FROM inspections WHERE {which} AND id <= (SELECT id FROM inspections"
                    f" WHERE {which} ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    (most,),
                )
        database.execute("DELETE FROM disagreements WHERE id NOT IN (SELECT id FROM inspections)")

    def _failed(self, category: str, error: Exception) -> None:
        if not self._has_failed:  # once, not for every image
            logger.warning(
                "the history of %s in %s cannot be written (%s): make room or name another folder"
                " (history.folder in the fleet file); inspections go on without it",
                category,
                self._folder,
                error,
            )
        self._has_failed = True

    def _count(self, category: str, outcome: Outcome) -> None:
        if self._meter:
            self._meter.kept(category, outcome)

    # ---- the files

    @property
    def _oldest(self) -> int:
        """The lowest number that is not too old."""
        return int((self._clock() - self._settings.days * 86400) * _MICROSECONDS)

    @contextmanager
    def _open(self, category: str, *, is_new: bool = False) -> Iterator[sqlite3.Connection]:
        """The file of a category, in a transaction that ends with the block.

        `_NothingKeptError` if there is none and it is not to be made.
        """
        path = self._folder / f"{category}.sqlite"
        if not path.exists():
            if not is_new:
                raise _NothingKeptError
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # for its owner alone
        try:
            with closing(sqlite3.connect(path, timeout=_PATIENCE_S)) as database:
                database.row_factory = sqlite3.Row
                database.execute("PRAGMA auto_vacuum = FULL")  # what is pruned frees the disk
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                with database:
                    database.execute(_INSPECTIONS)
                    database.execute(_INDEX)
                    database.execute(_DISAGREEMENTS)
                    yield database
        except sqlite3.Error as error:
            if is_new:
                raise
            raise problems.busy(
                f"the history of {category} on {self._node} cannot be read ({error})",
                if_it_lasts=f"look at {path} on that node; removing it forgets the history",
            ) from error


class _NothingKeptError(Exception):
    """What is asked for was not kept."""


def _inspection(category: str, row: sqlite3.Row, *beside: str) -> KeptInspection:
    """What a row says, but for the columns `beside`."""
    values = {name: value for name, value in dict(row).items() if name not in beside}
    said = {name: values.pop(f"candidate{name}") for name in ("", "_score", "_threshold")}
    candidate = None
    if said[""] is not None:
        candidate = KeptCandidate(
            version=said[""],
            score=said["_score"],
            threshold=said["_threshold"],
            is_anomalous=not values["is_anomalous"],
        )
    at = datetime.fromtimestamp(values["id"] / _MICROSECONDS, timezone.utc)
    return KeptInspection(
        **{
            **values,
            "category": category,
            "at": at.isoformat(timespec="milliseconds"),
            "regions": json.loads(values["regions"]),
            "candidate": candidate,
        }
    )

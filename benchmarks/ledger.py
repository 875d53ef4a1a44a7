"""The rows of a benchmark, kept on disk as they are finished, so that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apt_ray.errors import DataError
from apt_ray.files import write_json, writing
from apt_ray.validation.evaluation import Result

Floats = NDArray[np.float64]

_SETUP = "setup"


class Key(NamedTuple):
    """What names a row."""

    method: str
    category: str
    shots: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method, fitted once. Metrics are in 0..1, None where the data do not define them.

    Attributes:
        good_rejected, defects_found: shares of the normal and of the anomalous test images above
            the threshold; None for a method that sets none.
        fit_seconds: encoding of the support set included.
        image_ms: reading, encoding and scoring of one test image, in batches.
        peak_mb: the most memory that a process of its own held while it fitted and inspected, in
            millions of bytes; None where that was not measured.
    """

    method: str
    category: str
    shots: int
    seed: int
    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    good_rejected: float | None
    defects_found: float | None
    fit_seconds: float
    image_ms: float
    peak_mb: float | None = None

    @classmethod
    def of(cls, result: Result, *, fit_seconds: float, image_ms: float) -> Row:
        """What a fit, evaluated, comes to."""
        return cls(
            method=result.variant,
            category=result.category,
            shots=result.shots,
            seed=result.seed,
            image_auroc=result.image_auroc,
            pixel_auroc=result.pixel_auroc,
            aupro=result.aupro,
            good_rejected=result.good_rejected,
            defects_found=result.defects_found,
            fit_seconds=fit_seconds,
            image_ms=image_ms,
        )

    @property
    def key(self) -> Key:
        return Key(self.method, self.category, self.shots, self.seed)


class Ledger:
    """Finished rows with their resampled metrics; in memory, or also in FILE and FILE's `.npz`.

    Attributes:
        rows: by key, in the order in which they were finished.
        resamples: key -> metric -> `(1 + R,)`, as `apt_ray.validation.intervals.resample` gives it.
    """

    def __init__(self, path: Path | None, setup: Mapping[str, Any]) -> None:
        """Read what an earlier run left in `path`; DataError if it was set up in another way."""
        self.rows: dict[Key, Row] = {}
        self.resamples: dict[Key, dict[str, Floats]] = {}
        self._path = path
        self._setup = json.loads(json.dumps(setup))
        if path is not None and path.exists():
            self._read(path)

    def add(self, row: Row, resamples: dict[str, Floats]) -> None:
        """Keep a finished row; it survives whatever happens next."""
        self.rows[row.key], self.resamples[row.key] = row, resamples
        if self._path is None:
            return
        arrays = {
            "/".join(map(str, (*key, metric))): values
            for key, metrics in self.resamples.items()
            for metric, values in metrics.items()
        }
        with writing(self._path.with_suffix(".npz")) as place, place.open("wb") as file:
            np.savez(file, **{_SETUP: np.array(json.dumps(self._setup))}, **arrays)
        write_json(self._path, [asdict(one) for one in self.rows.values()])

    def _read(self, path: Path) -> None:
        remedy = "give another --json FILE, or remove this one to begin again"
        try:
            rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            setup = json.loads(str(arrays.pop(_SETUP)))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} and its .npz are not what this benchmark wrote ({error}): {remedy}"
            ) from error
        changed = [name for name, value in self._setup.items() if setup.get(name) != value]
        if changed:
            raise DataError(f"{path} was made with another {' and '.join(changed)}: {remedy}")
        for name, values in arrays.items():
            method, category, shots, seed, metric = name.split("/")
            key = Key(method, category, int(shots), int(seed))
            self.resamples.setdefault(key, {})[metric] = values
        self.rows = {row.key: row for row in rows if row.key in self.resamples}

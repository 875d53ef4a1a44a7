"""Damaged input against what reads it: `python -m benchmarks.fuzz [--inputs 20000]`.

Every image must become an RGB image within the limits, every mask a mask, every form a report, or
else an error that names cause and remedy. An image of sound pixels must be read, whatever its
metadata; a form that lost its end must not be answered. Anything else is printed with its seed, and
the exit code is 1.
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
from fastapi import FastAPI
from tqdm import tqdm

from apt_ray.errors import DataError, ImageError
from apt_ray.files import write_json
from apt_ray.images import decode_image, read_mask
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.messages import (
    CategoryReport,
    Inspected,
    InspectionReport,
    InspectionRequest,
    Timings,
)
from serving.regions import mask_of_png, mask_png
from serving.settings import Auth, HttpLimits
from tests.mutations import cut_form, damaged_form, mutated, mutated_mask, with_damaged_metadata

_HTTP = HttpLimits(max_bytes=2**22, max_pixels=1_000_000)
_SIZE = (48, 40)
_SLOW_S = 1.0


def main() -> int:
    """Try the inputs; returns the exit code."""
    parser = argparse.ArgumentParser(description="Damaged input against what reads it.")
    parser.add_argument("--inputs", type=int, default=20_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    unexpected: list[str] = []
    kinds: dict[str, dict[str, object]] = {}
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder, closing(loop):
        path = Path(folder) / "mask"
        attempts: dict[str, Callable[[int], str]] = {
            "images": lambda seed: _decode(mutated(seed), may_fail=True),
            "metadata": lambda seed: _decode(with_damaged_metadata(seed), may_fail=False),
            "masks": lambda seed: _read_mask(path, mutated_mask(seed)),
            "regions of interest": lambda seed: _read_region(path, mutated_mask(seed)),
            "forms": lambda seed: loop.run_until_complete(
                _send(*damaged_form(seed), may_succeed=True)
            ),
            "forms without their end": lambda seed: loop.run_until_complete(
                _send(*cut_form(seed), may_succeed=False)
            ),
        }
        for kind, attempt in attempts.items():
            outcomes: Counter[str] = Counter()
            slowest = 0.0
            seeds = range(options.seed, options.seed + options.inputs)
            for seed in tqdm(seeds, desc=kind, unit=""):
                begin = time.thread_time()  # not the clock: the machine has other work
                try:
                    outcomes[attempt(seed)] += 1
                except Exception as error:
                    unexpected.append(f"{kind}, seed {seed}: {error!r}")
                took = time.thread_time() - begin
                slowest = max(slowest, took)
                if took > _SLOW_S:
                    unexpected.append(f"{kind}, seed {seed}: took {took:.1f} s")
            kinds[kind] = {
                "inputs": options.inputs,
                "slowest_ms": round(1000 * slowest, 1),
                "outcomes": dict(outcomes.most_common()),
            }
    result = {"kinds": kinds, "unexpected": unexpected}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    return 1 if unexpected else 0


class _Decoding:
    """A service that decodes and inspects nothing."""

    async def describe(self, category: str) -> CategoryReport:
        raise NotImplementedError

    async def inspect(self, category: str, data: bytes, request: InspectionRequest) -> Inspected:
        decode_image(data, limits=_HTTP.image)
        report = InspectionReport(
            category=category,
            version=1,
            backbone="none",
            anomaly_score=0,
            threshold=1,
            is_anomalous=False,
            p_value=None,
            certified_false_alarm_rate=None,
            regions=[],
            timings_ms=Timings(receive=0, decode=0, queue=0, inspect=0, conclude=0),
        )
        return Inspected(report=report, picture_png=None)


_API: FastAPI = create_api(_Decoding(), http=_HTTP, access=Access(Auth()))


def _decode(data: bytes, *, may_fail: bool) -> str:
    try:
        image = decode_image(data, limits=_HTTP.image)
    except ImageError as error:
        if not may_fail:
            raise
        return type(error).__name__
    _require(image.mode == "RGB", f"mode {image.mode}")
    _require(image.width * image.height <= _HTTP.max_pixels, f"size {image.size}")
    return "decoded"


def _read_mask(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    try:
        mask_HW = read_mask(path, _SIZE)
    except DataError as error:
        return type(error).__name__
    _require(mask_HW.shape == _SIZE[::-1], f"shape {mask_HW.shape}")
    return "read"


def _read_region(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    try:
        mask_HW = mask_of_png(mask_png(path))
    except DataError as error:
        return type(error).__name__
    _require(bool(mask_HW.any()), "an empty region")
    return "read"


async def _send(content_type: str, body: bytes, *, may_succeed: bool) -> str:
    """The status of the answer to a form."""
    transport = httpx.ASGITransport(_API)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        answer = await client.post(
            "/v1/nut/inspect",
            content=body,
            headers=[(b"Content-Type", content_type.encode("latin-1"))],
        )
    if answer.status_code == 200:
        _require(may_succeed, "answered with 200")
        _require(bool({"inspections", "version"} & set(answer.json())), "a 200 without a report")
    else:
        _require(answer.status_code in (400, 413, 415), f"answered with {answer.status_code}")
        _require(bool(answer.json()["remedy"]), "a problem without a remedy")
    return str(answer.status_code)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow's remarks on damaged files
    logging.disable()  # and those of the form's parser
    sys.exit(main())

"""What trying candidates costs the answers: `python -m benchmarks.shadow [--json FILE]`.

One replica serves five categories with the same champion. The candidates of the first three are
tried on none, a tenth and all of the images; that of the fourth disagrees on each, which is then
kept; that of the fifth has another encoder. They are asked in turns, a block of images each, from
one connection that asks again at once, and at a steady rate.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request

import torch

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import find_categories
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import fetch
from apt_ray.features.clip import load_backbone
from apt_ray.images import decode_image
from apt_ray.prompts.fit import fit
from apt_ray.registry import open_registry
from apt_ray.tables import markdown
from benchmarks.fleet import CATEGORY, Client, RunningFleet, fleet, prepare
from benchmarks.rows import compared, write_rows
from benchmarks.serving_load import Steady

_SHARES = {"none": 0.0, "tenth": 0.1, "all": 1.0, "apart": 1.0, "encoder": 1.0}
_KEPT = 100
_OTHER = BackboneSpec(locality_radius=2)


def main() -> None:
    """Measure, and print the percentiles of each category."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=100, help="of a block")
    parser.add_argument("--rate", type=float, default=10, help="steady requests a second")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        champion, data = prepare(folder, "builtin")
        passing = _with_threshold(champion, 1.0)
        other = _other_encoder(folder)
        _costs(champion, other, data)
        entries = {each: {"shadow": {"share": share}} for each, share in _SHARES.items()}
        settings = {
            "categories": entries,
            "pools": {"line": {"autoscaling": {"max_replicas": 1}, "max_wait_s": 60}},
            "pool": "line",
            "history": {"folder": str(folder / "history")},
            "shadow": {"images": _KEPT},
        }
        with fleet(
            folder / "fleet", passing, threads=1, categories=tuple(_SHARES), settings=settings
        ) as running:
            registry = open_registry(running.tracking_uri)
            for category in _SHARES:
                candidate = {"apart": _with_threshold(passing, 0.0), "encoder": other}
                version = candidate.get(category, passing).with_category(category)
                registry.register(version, pictures={}, trials=[])
            _warm(running, data)
            closed: dict[str, list[float]] = defaultdict(list)
            steady: dict[str, list[float]] = defaultdict(list)
            for _ in range(options.rounds):
                for category in _SHARES:
                    closed[category] += _closed(running.url, category, data, options.images)
                for category in _SHARES:
                    load = Steady(running.url, category, data)
                    load.run([options.rate], options.images / options.rate)
                    steady[category] += [each.ms for each in load.answers if each.status == 200]
            time.sleep(21)  # replicas tell what they have counted every 10 s
            found = {category: _tried(running, category) for category in _SHARES}
        kept = sum(file.stat().st_size for file in (folder / "history").rglob("*"))

    print(f"each of {options.rounds} x {options.images} images; ms, p50 / p95 / p99\n")
    rows = [
        (
            category,
            f"{share:g}",
            " / ".join(f"{value:.1f}" for value in _percentiles(closed[category])),
            " / ".join(f"{value:.1f}" for value in _percentiles(steady[category])),
            *found[category],
        )
        for category, share in _SHARES.items()
    ]
    header = ("category", "share", "at once", f"{options.rate:g}/s", "tried", "dropped", "agree")
    print(markdown(header, rows))
    print(f"\nkept of {_KEPT} disagreements at the most: {kept / 1e6:.2f} MB on disk\n")
    ours = [
        compared(f"share {_SHARES[category]:g} ({category}), {how}, {what}", value, base, "ms")
        for how, times in (("at once", closed), ("steady", steady))
        for category in list(_SHARES)[1:]
        for what, value, base in zip(
            ("p50", "p95", "p99"),
            _percentiles(times[category]),
            _percentiles(times["none"]),
            strict=True,
        )
    ]
    write_rows(ours, options.json)


def _with_threshold(prompt_set: PromptSet, value: float) -> PromptSet:
    threshold = prompt_set.threshold.moved_to(value)
    return prompt_set.with_threshold(threshold)


def _other_encoder(folder: Path) -> PromptSet:
    """A prompt set of the same images by another attention, which is another encoder."""
    category = next(c for c in find_categories(folder / "samples") if c.name == CATEGORY)
    fitted = fit(
        CATEGORY,
        category.support_set(4, seed=0),
        FitSettings(steps=2),
        backbone=load_backbone(_OTHER),
    )
    return _with_threshold(fitted, 1.0)


@torch.inference_mode()
def _costs(champion: PromptSet, other: PromptSet, data: bytes) -> None:
    """What of an inspection is the score alone, which is all that a candidate costs."""
    torch.set_num_threads(1)
    image = decode_image(data)
    for name, prompt_set in (("the same encoder", champion), ("another encoder", other)):
        detector = Detector(load_backbone(prompt_set.backbone), prompt_set)
        backbone = detector.backbone
        encoded, scored = [], []
        for _ in range(60):
            started = time.perf_counter()
            features = backbone.encode_images(backbone.preprocess([image]))
            between = time.perf_counter()
            detector.score(features)
            encoded.append(1000 * (between - started))
            scored.append(1000 * (time.perf_counter() - between))
        print(
            f"{name}: {statistics.median(encoded[9:]):.2f} ms to encode an image,"
            f" {statistics.median(scored[9:]):.2f} ms to score it;"
            f" {len(prompt_set.to_bytes()) / 1e6:.2f} MB of prompt set"
        )


def _warm(running: RunningFleet, data: bytes) -> None:
    """Return once each candidate has been tried, but where none is."""
    client = Client(running.url)
    waiting = {category for category, share in _SHARES.items() if share}
    deadline = time.monotonic() + 180
    while waiting:
        for category in _SHARES:
            client.inspect(data, category)
        waiting = {category for category in waiting if _tried(running, category)[0] == "0"}
        if time.monotonic() > deadline:
            raise TimeoutError(f"no candidate is tried for {', '.join(sorted(waiting))}")


def _tried(running: RunningFleet, category: str) -> tuple[str, str, str]:
    """How many images a candidate was tried on, how many were dropped, and how many agree."""
    status = json.loads(fetch(Request(f"{running.url}/fleet/status")))["categories"][category]
    shadow = status["shadow"] or {"images": 0, "dropped": 0, "agreement": None}
    agreement = "" if shadow["agreement"] is None else f"{shadow['agreement']:.1%}"
    return str(shadow["images"]), str(shadow["dropped"]), agreement


def _closed(url: str, category: str, data: bytes, images: int) -> list[float]:
    client, found = Client(url), []
    for _ in range(images):
        started = time.perf_counter()
        client.inspect(data, category)
        found.append(1000 * (time.perf_counter() - started))
    return found


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[94], cuts[98]


if __name__ == "__main__":
    main()

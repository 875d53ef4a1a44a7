"""A fleet that runs for an hour: `python -m benchmarks.soak [--minutes 60] [--plot docs/soak.png]`.

One pool serves three sample categories at a steady rate, with history, drift, a candidate on every
image and feedback on one in fifty, until the store of what people say takes no more. Of five
requests three are images; two are what pages and monitoring ask. Each minute: latencies of the
inspections, memory of each process, bytes of each store; at the end whether each bound held.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import Request

import psutil
from matplotlib.figure import Figure

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import fetch
from apt_ray.features.clip import load_backbone
from apt_ray.files import write_json
from apt_ray.prompts.fit import fit
from apt_ray.registry import open_registry
from apt_ray.tables import markdown
from benchmarks.fleet import Client, RunningFleet, fleet

_IMAGES, _DISAGREEMENTS = 200, 50  # that a category may keep
_SAID = 400  # that the store of feedback may hold of a category
_LOOKS = {
    3: "/v1/{}/history?limit=50",
    8: "/fleet/status",
    13: "/v1/{}/shadow",
    18: "/v1/{}/feedback",
}
_LOOKS |= dict.fromkeys((4, 9, 14, 19), "/v1/{}")  # which of twenty requests ask for what
_SAID_EVERY, _SAID_LATER = 50, 100  # of one image in so many, so many images later
_IMAGE_BYTES = 150_000  # of one of them, by the documents
_SQLITE_BYTES = 8 * 2**20  # of a category's file beside its images: its journal, and free pages
_VERSIONS = 3  # of a category in the cache
_DEFECTIVE = 0.05
_SENDERS = 64
_PROCESSES = {
    "replica": "ServeReplica:pool-line",
    "controller": "ServeReplica:controller",
    "root": "ServeReplica:root",
    "proxy": "ProxyActor",
    "HAProxy": "bin/haproxy",
}
_GROWTH = 0.05
"""By how much the memory of a process may be larger in the last quarter than in the second one."""
_SLOWER = 1.25
"""How many times the p95 of the second quarter that of the last one may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A folder that the fleet writes to.

    Attributes:
        most_bytes: that it may take; None where nothing of the fleet's own bounds it.
    """

    name: str
    folder: Path
    most_bytes: int | None = None

    @property
    def bytes(self) -> int:
        found = 0
        for path in self.folder.rglob("*"):
            try:
                found += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
            except FileNotFoundError:  # it has just been removed
                continue
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Minute:
    """What one minute came to.

    Attributes:
        statuses: status -> inspections; 0 where no answer came.
        looks, said: the same of pages and of feedback.
        ms: p50, p95 and p99 of the inspections.
        pss: process -> bytes of memory, shared pages by their share.
        stores: store -> bytes.
    """

    number: int
    statuses: dict[int, int]
    looks: dict[int, int]
    said: dict[int, int]
    ms: tuple[float, float, float]
    pss: dict[str, int]
    stores: dict[str, int]


def main() -> None:
    """Run the fleet, and say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--threads", type=int, default=1, help="of the replica")
    parser.add_argument(
        "--reference-encoder", metavar="NAME", help="'backbone' inspects without the trunk"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (PNG)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-soak-") as name:
        folder = Path(name)
        spec = BackboneSpec(reference_encoder=options.reference_encoder)
        champions, candidates, images = _prepare(folder, spec)
        names = tuple(champions)
        settings = {
            "categories": {name: {} for name in names},
            "pools": {"line": {"autoscaling": {"max_replicas": 1}}},
            "pool": "line",
            "registry": {"cache": str(folder / "cache")},
            "history": {"images": _IMAGES, "folder": str(folder / "history")},
            "shadow": {"share": 1, "images": _DISAGREEMENTS},
            "feedback": {
                "images": _SAID,
                "per_day": 10 * _SAID,
                "folder": str(folder / "feedback"),
            },
        }
        with fleet(
            folder / "fleet", champions, threads=options.threads, settings=settings
        ) as running:
            registry = open_registry(running.tracking_uri)
            for each in candidates.values():
                registry.register(each, pictures={}, trials=[])
            stores = _stores(running, folder, len(names), champions[names[0]])
            load = Line(running.url, images, options.rate)
            with load:
                minutes = [
                    _minute(number, load, running, stores)
                    for number in range(1, options.minutes + 1)
                ]
            status = fetch(Request(f"{running.url}/fleet/status"))
    bounds = _bounds(minutes, stores)
    shadows = {
        category: known["shadow"] for category, known in json.loads(status)["categories"].items()
    }
    print(f"\ncandidates: {json.dumps(shadows, indent=1)}\n")
    print(markdown(("bound", "found", "at most", "held"), [bound.row for bound in bounds]))
    if options.plot:
        _draw(minutes, options.plot)
    if options.json:
        write_json(options.json, {"minutes": [asdict(each) for each in minutes]})


def _stores(
    running: RunningFleet, folder: Path, categories: int, prompt_set: PromptSet
) -> list[Store]:
    """All that the fleet writes to; another store is another line."""
    images = categories * (_IMAGES + _DISAGREEMENTS)
    versions = categories * _VERSIONS * len(prompt_set.to_bytes())
    return [
        Store(
            name="history",
            folder=folder / "history",
            most_bytes=images * _IMAGE_BYTES + categories * _SQLITE_BYTES,
        ),
        Store(
            name="feedback",
            folder=folder / "feedback",
            most_bytes=categories * _SAID * _IMAGE_BYTES,
        ),
        Store(name="cache", folder=folder / "cache", most_bytes=versions + 2**20),
        Store(name="Ray's logs", folder=running.ray_folder),
    ]


def _prepare(
    folder: Path, spec: BackboneSpec
) -> tuple[dict[str, PromptSet], dict[str, PromptSet], dict[str, list[bytes]]]:
    """For each category a champion, a candidate from other images, and images to inspect."""
    samples = find_categories(write_samples(folder / "samples", test_good=40)[0].parent)
    backbone, rng = load_backbone(spec), random.Random(0)
    champions, candidates, images = {}, {}, {}
    for category in samples:
        champions[category.name], candidates[category.name] = (
            fit(
                category.name,
                category.support_set(4, seed=seed),
                FitSettings(steps=20),
                backbone=backbone,
            )
            for seed in (0, 1)
        )
        good, bad = (
            [image.path.read_bytes() for image in category.test if image.is_anomalous == defective]
            for defective in (False, True)
        )
        count = round(len(good) * _DEFECTIVE / (1 - _DEFECTIVE))
        images[category.name] = rng.sample(mixed := good + bad[:count], len(mixed))
    return champions, candidates, images


class Line:
    """Cameras: images of all categories in turn at a steady rate, while the block runs.

    Of one image in fifty somebody says later that it was good, whatever it is.
    """

    def __init__(self, url: str, images: Mapping[str, Sequence[bytes]], rate: float) -> None:
        self._url = url
        lines = {name: itertools.cycle(files) for name, files in images.items()}
        self._turns = ((name, next(lines[name])) for name in itertools.cycle(images))
        self._interval = 1 / rate
        self._senders = ThreadPoolExecutor(_SENDERS)
        self._ending = threading.Event()
        self._clock = threading.Thread(target=self._run)
        self._own = threading.local()
        self._answers: list[tuple[int, float]] = []
        self._looks: list[int] = []
        self._said: list[int] = []
        self._answered: deque[tuple[str, str]] = deque(maxlen=_SAID_LATER)

    def __enter__(self) -> "Line":
        self._began = time.perf_counter()
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._clock.join()
        self._senders.shutdown()

    def wait(self, seconds: float) -> None:
        """Return so many seconds after the first image."""
        time.sleep(max(0.0, self._began + seconds - time.perf_counter()))

    def taken(self) -> tuple[list[tuple[int, float]], list[int], list[int]]:
        """(status, milliseconds) of the inspections since this was last asked, and the statuses of
        pages and of feedback."""
        taken = self._answers, self._looks, self._said
        self._answers, self._looks, self._said = [], [], []
        return taken

    def _run(self) -> None:
        due = time.perf_counter()
        for number in itertools.count():
            if self._ending.wait(max(0.0, due - time.perf_counter())):
                return
            due += self._interval
            look = _LOOKS.get(number % 20)
            if look is None:
                self._senders.submit(self._inspect, number, *next(self._turns))
            else:
                self._senders.submit(self._look, look.format(next(self._turns)[0]))

    @property
    def _client(self) -> Client:
        """The connection of the thread that asks."""
        if not hasattr(self._own, "client"):
            self._own.client = Client(self._url)
        return self._own.client

    def _inspect(self, number: int, category: str, data: bytes) -> None:
        sent, request_id = time.perf_counter(), f"soak-{number}"
        status = self._status(lambda: self._client.inspect(data, category, request_id))
        self._answers.append((status, 1000 * (time.perf_counter() - sent)))
        self._answered.append((category, request_id))
        if number % _SAID_EVERY == 0:
            said = self._answered[0]
            self._said.append(self._status(lambda: self._client.say("confirmed_good", *said)))

    def _look(self, path: str) -> None:
        self._looks.append(self._status(lambda: self._client.get(path)))

    @staticmethod
    def _status(ask: Callable[[], int]) -> int:
        try:
            return ask()
        except OSError:
            return 0


def _minute(number: int, load: Line, running: RunningFleet, stores: Sequence[Store]) -> Minute:
    """Wait for a minute, and say what it came to."""
    load.wait(60 * number)
    answers, looks, said = load.taken()
    cuts = statistics.quantiles([ms for _, ms in answers], n=100)
    minute = Minute(
        number=number,
        statuses=dict(Counter(status for status, _ in answers)),
        looks=dict(Counter(looks)),
        said=dict(Counter(said)),
        ms=(cuts[49], cuts[94], cuts[98]),
        pss=_memory(running),
        stores={store.name: store.bytes for store in stores},
    )
    parts = [
        f"minute {number}: {minute.statuses}, pages {minute.looks}, feedback {minute.said}",
        "p50/p95/p99 " + "/".join(f"{value:.0f}" for value in minute.ms) + " ms",
        *(f"{name} {size / 2**20:.0f} MiB" for name, size in minute.pss.items()),
        *(f"{name} {size / 1e6:.1f} MB" for name, size in minute.stores.items()),
    ]
    print(", ".join(parts), flush=True)
    return minute


def _memory(running: RunningFleet) -> dict[str, int]:
    found = {}
    for name, title in _PROCESSES.items():
        with suppress(LookupError, psutil.Error):
            found[name] = running.process(title).memory_full_info().pss
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Something that was to stay within limits."""

    name: str
    found: float
    most: float
    unit: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        held = "yes" if self.found <= self.most else "NO"
        return self.name, f"{self.found:.4g} {self.unit}", f"{self.most:.4g} {self.unit}", held


def _bounds(minutes: Sequence[Minute], stores: Sequence[Store]) -> list[Bound]:
    """The first quarter fills memory and stores; what comes then is to stay as it is."""
    quarter = max(len(minutes) // 4, 1)
    second, last = minutes[quarter : 2 * quarter] or minutes, minutes[-quarter:]

    def mean(some: Sequence[Minute], value: Callable[[Minute], float]) -> float:
        return statistics.fmean(map(value, some))

    failed = sum(
        count
        for each in minutes
        for statuses in (each.statuses, each.looks)
        for status, count in statuses.items()
        if status != 200
    )
    bounds = [
        Bound(name="images and pages without an answer of 200", found=failed, most=0, unit=""),
        Bound(
            name="p95, last quarter",
            found=mean(last, lambda each: each.ms[1]),
            most=_SLOWER * mean(second, lambda each: each.ms[1]),
            unit="ms",
        ),
    ]
    for name in minutes[-1].pss:

        def used(each: Minute, name: str = name) -> float:
            return each.pss.get(name, 0) / 2**20

        bounds.append(
            Bound(
                name=f"memory (PSS) of the {name}, last quarter",
                found=mean(last, used),
                most=(1 + _GROWTH) * mean(second, used),
                unit="MiB",
            )
        )
    for store in stores:
        most = max(each.stores[store.name] for each in minutes)
        if store.most_bytes is not None:
            bounds.append(
                Bound(
                    name=f"{store.name}, the most",
                    found=most / 1e6,
                    most=store.most_bytes / 1e6,
                    unit="MB",
                )
            )
    return bounds


def _draw(minutes: Sequence[Minute], file: Path) -> None:
    figure = Figure(figsize=(9, 8), layout="constrained")
    latency, memory, disk = figure.subplots(3, sharex=True)
    at = [minute.number for minute in minutes]
    for place, label in enumerate(("p50", "p95", "p99")):
        latency.plot(at, [minute.ms[place] for minute in minutes], label=label)
    latency.set_ylabel("latency in ms")
    for name in _PROCESSES:
        memory.plot(at, [minute.pss.get(name, 0) / 2**20 for minute in minutes], label=name)
    memory.set_ylabel("memory (PSS) in MiB")
    for name in minutes[0].stores:
        disk.plot(at, [minute.stores[name] / 1e6 for minute in minutes], label=name)
    disk.set_ylabel("on disk in MB")
    disk.set_xlabel("minutes")
    for axes in (latency, memory, disk):
        axes.set_ylim(0, None)
        axes.legend(loc="center right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()

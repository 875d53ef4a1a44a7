"""Loads that change: `python -m benchmarks.serving_load [--plot FILE] [--json FILE]`.

First a ramp: requests come at a rate that rises and falls, and the replicas follow. Then a flood:
one category is asked without end, and another, which has a pool of its own, at a steady rate; its
latencies are set beside those of a quiet fleet.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request

from matplotlib.figure import Figure

from apt_ray.devtools.local_stack import fetch
from benchmarks.fleet import CATEGORY, Client, fleet, prepare
from benchmarks.rows import Row, compared, write_rows

_QUIET = "quiet"
_SENDERS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request: when it was sent, in seconds of its load, how long it took, its status."""

    at_s: float
    ms: float
    status: int


@dataclass(slots=True)
class Steady:
    """Sends requests at given rates, whether or not earlier ones are answered.

    Attributes:
        answers: what came back.
    """

    url: str
    category: str
    data: bytes
    answers: list[Answer] = field(default_factory=list)
    _own: threading.local = field(default_factory=threading.local)

    def run(self, rates: Sequence[float], seconds: float) -> None:
        """Each rate, in requests a second, for so many seconds."""
        started = due = time.perf_counter()
        with ThreadPoolExecutor(_SENDERS) as senders:
            for number, rate in enumerate(rates):
                while due < started + (number + 1) * seconds:
                    time.sleep(max(0.0, due - time.perf_counter()))
                    senders.submit(self._send, started)
                    due += 1 / rate

    def _send(self, started: float) -> None:
        if not hasattr(self._own, "client"):
            self._own.client = Client(self.url)
        sent = time.perf_counter()
        status = self._own.client.inspect(self.data, self.category)
        ms = 1000 * (time.perf_counter() - sent)
        self.answers.append(Answer(at_s=sent - started, ms=ms, status=status))


class ReplicaWatch:
    """Counts a category's replicas twice a second, as the fleet itself reports them.

    Attributes:
        counts: (seconds since the start, replicas that serve).
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.counts: list[tuple[float, int]] = []

    def __enter__(self) -> "ReplicaWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        while not self._end.wait(0.5):
            status = json.loads(fetch(Request(f"{self._url}/fleet/status")))
            replicas = status["categories"][CATEGORY]["replicas"]
            self.counts.append((time.perf_counter() - started, replicas))


def main() -> None:
    """Run both loads and print what came back."""
    parser = argparse.ArgumentParser(description="Loads that change.")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[4, 12, 24, 40, 24, 8, *[0.5] * 6]
    )
    parser.add_argument("--seconds", type=float, default=20, help="of each rate, and of the flood")
    parser.add_argument("--proxy", choices=["haproxy", "default"], default="haproxy")
    parser.add_argument("--max-replicas", type=int, default=4)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ramp (PNG)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    scaled = {
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 3,
        "downscale_delay_s": 15,
    }
    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        prompt_set, data = prepare(Path(name), "builtin")
        with (
            fleet(
                Path(name) / "ramp",
                prompt_set,
                haproxy=options.proxy == "haproxy",
                threads=1,
                autoscaling=scaled,
            ) as running,
            ReplicaWatch(running.url) as watch,
        ):
            ramp = Steady(running.url, CATEGORY, data)
            ramp.run(options.rates, options.seconds)
        with fleet(
            Path(name) / "flood",
            prompt_set,
            haproxy=options.proxy == "haproxy",
            threads=1,
            max_wait_s=2,
            categories=(CATEGORY, _QUIET),
        ) as running:
            alone, beside = (Steady(running.url, _QUIET, data) for _ in range(2))
            alone.run([2], options.seconds)
            flood = _flood(running.url, data, beside, options.seconds)
    if options.plot:
        _draw(options.rates, options.seconds, watch.counts, ramp.answers, options.plot)
    counts = [count for _, count in watch.counts]
    print(f"ramp: {min(counts)} to {max(counts)} replicas, statuses {_statuses(ramp.answers)}")
    print(f"flooded: statuses {dict(flood)}; quiet: statuses {_statuses(beside.answers)}\n")
    quiet = zip(
        ("median", "p95"), _latencies(beside.answers), _latencies(alone.answers), strict=True
    )
    rows = [
        _answered("ramp: answered of all sent", ramp.answers),
        _answered("quiet category beside a flood: answered of all sent", beside.answers),
        *(
            compared(f"quiet category beside a flood against alone, {what}", ours, before, "ms")
            for what, ours, before in quiet
        ),
    ]
    write_rows(rows, options.json)


def _answered(name: str, answers: Sequence[Answer]) -> Row:
    good = _statuses(answers).get(200, 0)
    return compared(name, good, len(answers), "requests", more_is_better=True)


def _flood(url: str, data: bytes, beside: Steady, seconds: float) -> Counter[int]:
    """Ask for one category from many connections at once while `beside` runs; its statuses."""
    until, statuses = time.perf_counter() + seconds, Counter[int]()

    def ask() -> None:
        client = Client(url)
        while time.perf_counter() < until:
            status = client.inspect(data)
            statuses[status] += 1
            if status != 200:
                time.sleep(0.2)  # a fifth of the Retry-After that it was given

    with ThreadPoolExecutor(_SENDERS) as senders:
        for _ in range(_SENDERS):
            senders.submit(ask)
        beside.run([2], seconds)
    return statuses


def _latencies(answers: Sequence[Answer]) -> list[float]:
    values = sorted(answer.ms for answer in answers)
    p95 = statistics.quantiles(values, n=20)[-1]
    return [round(statistics.median(values), 1), round(p95, 1)]


def _statuses(answers: Sequence[Answer]) -> dict[int, int]:
    return dict(Counter(answer.status for answer in answers))


def _draw(
    rates: Sequence[float],
    seconds: float,
    counts: Sequence[tuple[float, int]],
    answers: Sequence[Answer],
    file: Path,
) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.step([seconds * i for i in range(len(rates) + 1)], [*rates, rates[-1]], where="post")
    above.set_ylabel("requests a second")
    twin = above.twinx()
    twin.step(*zip(*counts, strict=True), where="post", color="tab:red")
    twin.set_ylabel("replicas", color="tab:red")
    twin.set_ylim(0, None)
    for good, colour, label in ((True, "tab:blue", "answered"), (False, "black", "refused")):
        shown = [answer for answer in answers if (answer.status == 200) == good]
        below.scatter(
            [answer.at_s for answer in shown],
            [answer.ms for answer in shown],
            s=4,
            color=colour,
            label=label,
        )
    below.set_yscale("log")
    below.set_ylabel("latency in ms")
    below.set_xlabel("seconds")
    below.legend(loc="upper right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()

"""Streams over real connections: uvicorn, as in each of Serve's replicas, and raw sockets."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from apt_ray.devtools.local_stack import HOST, free_ports
from apt_ray.images import decode_image, encode_png
from apt_ray.video.part import PartView
from serving.api import problems
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.messages import (
    CategoryReport,
    Explanation,
    Inspected,
    InspectionReport,
    InspectionRequest,
    RegionReport,
    Timings,
)
from serving.settings import Auth, HttpLimits

GOOD, BAD = 60, 200
REGION = RegionReport(x=1, y=2, width=3, height=4, peak=0.9, area=9)


def frame(level: int, seed: int) -> bytes:
    """A JPEG of a scene that never stands still, of this brightness in red."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    pixels[..., 0] = level
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Service:
    """Takes red for a defect. `busy` times it has no place; `hold` delays each answer."""

    def __init__(self) -> None:
        self.asked: list[InspectionRequest] = []
        self.cancelled = 0
        self.busy = 0
        self.hold_s = 0.0
        self.version, self.threshold = 3, 0.5
        self.part: PartView | None = None

    async def describe(self, category: str) -> CategoryReport:
        if category != "washer":
            raise problems.unknown_category(category, ["washer"])
        return CategoryReport(
            category=category,
            version=self.version,
            run_id="run",
            backbone="fake",
            fingerprint="f",
            threshold=self.threshold,
            certified_false_alarm_rate=None,
            normal_scores=[0.2, 0.3],
            part=self.part,
            shots=4,
            trained_at="now",
            settings={},
            metrics={},
        )

    async def inspect(self, category: str, data: bytes, asked: InspectionRequest) -> Inspected:
        self.asked.append(asked)
        if self.busy:
            self.busy -= 1
            raise problems.overloaded("no place")
        try:
            await asyncio.sleep(self.hold_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        red = np.asarray(decode_image(data))[..., 0].mean()
        score = 0.8 if red > 128 else 0.2
        return Inspected(
            report=InspectionReport(
                category=category,
                version=self.version,
                backbone="fake",
                anomaly_score=score,
                threshold=self.threshold,
                is_anomalous=score > self.threshold,
                p_value=None,
                certified_false_alarm_rate=None,
                regions=[REGION] if score > self.threshold else [],
                timings_ms=Timings(receive=0, decode=0, queue=0, inspect=0, conclude=0),
            ),
            picture_png=None,
        )

    async def explain(self, category: str, data: bytes, asked: InspectionRequest) -> Explanation:
        raise AssertionError("nothing here explains")


class Connection:
    """A request whose body is sent piece by piece, while its answer is read."""

    def __init__(self, url: str, path: str, content_type: str = "image/jpeg") -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        self._answer = self.socket.makefile("rb")
        self.headers = b""

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self) -> None:
        self.socket.sendall(b"0\r\n\r\n")

    def line(self) -> dict[str, Any] | None:
        """The next line of the answer; None behind the last."""
        while not self.headers.endswith(b"\r\n\r\n"):
            self.headers += self._answer.readline()
        if b"content-length" in self.headers:
            whole: dict[str, Any] = json.loads(self._answer.readline())
            return whole
        size = int(self._answer.readline(), 16)
        data = self._answer.read(size)
        self._answer.readline()
        found: dict[str, Any] | None = json.loads(data) if size else None
        return found

    def lines(self) -> list[dict[str, Any]]:
        return list(iter(self.line, None))

    def close(self) -> None:
        self._answer.close()
        self.socket.close()


Serving = Callable[..., tuple[Service, str]]


@pytest.fixture
def serving() -> Iterator[Serving]:
    """Starts a server with a service of its own."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**streams: Any) -> tuple[Service, str]:
        service = Service()
        http = HttpLimits.parse({"max_bytes": 40_000, "timeout_s": 2, "streams": streams})
        api = create_api(service, http=http, access=Access(Auth()))
        (port,) = free_ports(1)
        server = uvicorn.Server(
            uvicorn.Config(
                api, host=HOST, port=port, log_level="warning", timeout_graceful_shutdown=1
            )
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return service, f"http://{HOST}:{port}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


def stream(levels: list[int]) -> list[bytes]:
    return [frame(level, seed) for seed, level in enumerate(levels)]


def events(lines: list[dict[str, Any]]) -> list[tuple[str, bool, int, int]]:
    told = [line["event"] for line in lines if "event" in line]
    return [(each["kind"], each["is_over"], each["start"], each["end"]) for each in told]


LEVELS = [GOOD] * 3 + [BAD] * 3 + [GOOD] * 3


def test_events_are_told_while_the_stream_goes_on(serving: Serving) -> None:
    service, url = serving()
    connection = Connection(url, "/v1/washer/stream?fps=10")
    connection.send(*stream(LEVELS[:5]))
    began = connection.line()
    assert b"200 OK" in connection.headers
    assert b"application/x-ndjson" in connection.headers
    assert began is not None
    assert (began["event"]["is_over"], began["event"]["start_s"]) == (False, 0.3)
    connection.send(*stream(LEVELS)[5:])
    over = connection.line()
    assert over is not None
    assert events([over]) == [("anomaly", True, 3, 5)]
    assert over["event"]["regions"] == [REGION.model_dump()]
    connection.end()
    (summary,) = connection.lines()
    assert summary["summary"]["frames"] == summary["summary"]["inspected"] == 9
    assert summary["summary"]["anomalies"] == 1
    assert all(asked.is_frame for asked in service.asked)
    connection.close()


def test_a_multipart_stream_and_a_whole_body_are_streams_too(serving: Serving) -> None:
    _, url = serving()
    parts = b"".join(
        b"--f\r\nContent-Type: image/jpeg\r\n\r\n" + file + b"\r\n" for file in stream(LEVELS)
    )
    kind = {"Content-Type": "multipart/x-mixed-replace; boundary=f"}
    answer = httpx.post(f"{url}/v1/washer/stream", content=parts + b"--f--", headers=kind)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert events(lines) == [("anomaly", False, 3, 3), ("anomaly", True, 3, 5)]


def test_some_of_the_frames_are_looked_at(serving: Serving) -> None:
    service, url = serving(event_frames=1)
    body = b"".join(stream([GOOD, BAD] * 10))
    answer = httpx.post(f"{url}/v1/washer/stream?every=2", content=body)
    assert events([json.loads(line) for line in answer.text.splitlines()]) == []
    assert len(service.asked) == 10
    timed = f"{url}/v1/washer/stream?every=0.5s&fps=10"
    assert httpx.post(timed, content=body).status_code == 200
    assert len(service.asked) == 14


def test_frames_that_need_no_forward_cost_none(serving: Serving) -> None:
    service, url = serving(frozen_frames=5)
    service.part = PartView(
        ground=(0, 0, 0), unlike=100, rim=100, least_area=0.5, most_area=1, most_on_edge=1
    )
    still = frame(BAD, 0)
    body = b"".join([*stream([GOOD] * 4), *[still] * 12])
    answer = httpx.post(f"{url}/v1/washer/stream", content=body)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    summary = lines[-1]["summary"]
    assert (summary["no_part"], summary["inspected"], summary["unchanged"]) == (4, 1, 11)
    assert len(service.asked) == 1
    assert {kind for kind, *_ in events(lines)} == {"anomaly", "frozen"}
    httpx.post(f"{url}/v1/washer/stream?part=any", content=body)
    assert len(service.asked) == 6


def test_a_damaged_frame_is_counted_and_ends_nothing(serving: Serving) -> None:
    _, url = serving()
    files = stream(LEVELS)
    damaged = bytearray(encode_png(decode_image(files[4])))
    damaged[41:49] = b"\xff" * 8  # where the pixels begin
    files[4] = bytes(damaged)
    answer = httpx.post(f"{url}/v1/washer/stream", content=b"".join(files))
    summary = json.loads(answer.text.splitlines()[-1])["summary"]
    assert (summary["frames"], summary["damaged"], summary["anomalies"]) == (9, 1, 1)


def test_a_frame_that_the_end_of_the_body_cuts_off_is_told_and_ends_nothing(
    serving: Serving,
) -> None:
    service, url = serving()
    body = b"".join(stream(LEVELS))
    for every in ("1", "5"):
        answer = httpx.post(f"{url}/v1/washer/stream?every={every}", content=body[:-50])
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert not any("problem" in line for line in lines)
        summary = lines[-1]["summary"]
        assert (summary["damaged"], summary["is_cut_off"]) == (1, True)
        assert summary["frames"] == (9 if every == "1" else 3)
    assert len(service.asked) == 8 + 2
    answer = httpx.post(f"{url}/v1/washer/stream", content=body)
    assert json.loads(answer.text.splitlines()[-1])["summary"]["is_cut_off"] is False


def test_a_frame_that_finds_the_replicas_busy_waits(serving: Serving) -> None:
    service, url = serving()
    service.busy = 1
    answer = httpx.post(f"{url}/v1/washer/stream", content=b"".join(stream(LEVELS)))
    assert json.loads(answer.text.splitlines()[-1])["summary"]["inspected"] == 9
    assert len(service.asked) == 10


def test_another_version_brings_its_own_threshold(serving: Serving) -> None:
    service, url = serving()
    connection = Connection(url, "/v1/washer/stream")
    connection.send(*stream([BAD] * 3))
    assert connection.line() is not None
    service.version, service.threshold = 4, 0.9
    connection.send(*stream([BAD] * 3 + [GOOD] * 3 + [BAD] * 3)[3:])
    connection.end()
    assert events(connection.lines()) == [("anomaly", True, 0, 2)]
    connection.close()


def test_whoever_goes_away_costs_no_more_forwards(serving: Serving) -> None:
    service, url = serving(max_streams=1)
    service.hold_s = 30
    connection = Connection(url, "/v1/washer/stream")
    connection.send(*stream([GOOD] * 5))
    while not service.asked:
        time.sleep(0.01)
    refused = httpx.post(f"{url}/v1/washer/stream", content=frame(GOOD, 0))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    connection.close()
    while not service.cancelled:
        time.sleep(0.01)
    service.hold_s = 0
    deadline = time.monotonic() + 10  # its place is free again
    while time.monotonic() < deadline:
        answer = httpx.post(f"{url}/v1/washer/stream", content=frame(GOOD, 0))
        if answer.status_code == 200:
            break
    assert answer.status_code == 200
    assert len(service.asked) == 2


def test_what_comes_too_fast_ends_the_stream_or_is_dropped(serving: Serving) -> None:
    service, url = serving(max_ahead_bytes=6_000)
    service.hold_s = 0.05
    files = stream([GOOD] * 20)
    connection = Connection(url, "/v1/washer/stream")
    connection.send(files[0])
    while not service.asked:
        time.sleep(0.01)
    connection.send(b"".join(files[1:]))
    problem, summary = connection.lines()
    connection.close()
    assert problem["problem"]["title"] == "Too fast"
    assert "live=true" in problem["problem"]["remedy"]
    assert summary["summary"]["frames"] < 20
    answer = httpx.post(f"{url}/v1/washer/stream?live=true", content=b"".join(files))
    summary = json.loads(answer.text.splitlines()[-1])["summary"]
    assert summary["dropped"] > 0
    assert summary["frames"] + summary["dropped"] == 20


def test_a_stream_ends_when_its_time_is_over(serving: Serving) -> None:
    _, url = serving(max_s=0.3)
    connection = Connection(url, "/v1/washer/stream")
    connection.send(frame(GOOD, 0))
    problem, summary = connection.lines()
    assert problem["problem"]["title"] == "Stream too long"
    assert summary["summary"]["frames"] == 1
    connection.close()


@pytest.mark.parametrize(
    ("path", "kind", "body", "status", "says"),
    [
        ("washer/stream", "video/mp4", b"0000ftyp", 415, "video/mp4"),
        ("washer/stream", "image/jpeg", b"hello", 415, "no image"),
        ("washer/stream", "image/jpeg", b"hello" * 20_000, 415, "64 KiB"),
        ("washer/stream", "image/jpeg", b"\xff\xd8\xff\xe0", 415, "ends within an image"),
        ("washer/stream", "image/jpeg", b"\xff\xd8\xff\xda\0\2" + bytes(50_000), 413, "40,000"),
        ("washer/stream?every=0", "image/jpeg", b"", 422, "which frames"),
        ("washer/stream?every=soon", "image/jpeg", b"", 422, "every"),
        ("nut/stream", "image/jpeg", b"", 404, "nut"),
    ],
)
def test_what_is_no_stream_is_refused_with_the_remedy(
    serving: Serving, path: str, kind: str, body: bytes, status: int, says: str
) -> None:
    _, url = serving()
    answer = httpx.post(f"{url}/v1/{path}", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["detail"]
    assert answer.json()["remedy"]


def test_whoever_sends_nothing_keeps_no_place(serving: Serving) -> None:
    service, url = serving(max_streams=1)
    connection = Connection(url, "/v1/washer/stream")
    connection.send(b"--boundary\r\n")
    answer = connection.line()
    assert b"415" in connection.headers
    assert answer is not None
    assert "2 s" in answer["detail"]
    connection.close()
    assert httpx.post(f"{url}/v1/washer/stream", content=frame(GOOD, 0)).status_code == 200
    assert len(service.asked) == 1


def test_a_fleet_may_have_no_streams(serving: Serving) -> None:
    _, url = serving(max_streams=0)
    assert httpx.post(f"{url}/v1/washer/stream", content=frame(GOOD, 0)).status_code == 503


def test_the_lines_are_described(serving: Serving) -> None:
    _, url = serving()
    described = httpx.get(f"{url}/openapi.json").json()
    answer = described["paths"]["/v1/{category}/stream"]["post"]["responses"]["200"]["content"]
    line = {"$ref": "#/components/schemas/StreamLine"}
    assert answer == {"application/x-ndjson": {"schema": line}}
    assert {"StreamLine", "Event", "StreamSummary"} <= set(described["components"]["schemas"])

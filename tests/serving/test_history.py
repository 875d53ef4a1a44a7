"""The history of a node: what is kept, told, marked, removed, and left out."""

import asyncio
import hashlib
import io
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import read_image
from apt_ray.levels import UNTOLD
from serving.api.access import Access
from serving.api.history import (
    NO_HISTORY,
    KeptCandidate,
    KeptInspection,
    Mark,
    Only,
)
from serving.api.ingress import create_api
from serving.api.messages import InspectionReport
from serving.api.pools import Answering
from serving.api.problems import ProblemError
from serving.controller.orders import Order, StoredVersion
from serving.replica.history import History
from serving.replica.inspector import Inspector
from serving.settings import Auth, Decision, HistorySettings
from tests.disks import full_disk
from tests.serving.engines import torch_inspector
from tests.serving.test_root import AUTH, LIMITS, ask, root_of

Keeping = Callable[..., tuple[FastAPI, Inspector, History]]


class Counted:
    """A meter that counts what becomes of inspections."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def kept(self, category: str, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def keeping(tmp_path: Path, prompt_set: PromptSet) -> Keeping:
    """A fleet to whom everything is a defect, with a history."""

    def start(
        auth: Auth | None = None, *, meter: Counted | None = None, **settings: object
    ) -> tuple[FastAPI, Inspector, History]:
        folder = str(tmp_path / "history")
        values = HistorySettings.parse({"images": 100, "folder": folder, **settings})
        history = History(values, "registry", meter=meter)  # type: ignore[arg-type]
        inspector = torch_inspector(limits=LIMITS.image, shared=True, history=history)
        stored = StoredVersion(
            category="blister", version=7, run_id="r", data=prompt_set.to_bytes()
        )
        inspector.load("blister", Order(version=7, decision=Decision(threshold=0)), stored)
        return root_of(Answering(inspector, history), auth=auth), inspector, history

    return start


def inspect(api: FastAPI, data: bytes, name: str = "") -> dict[str, object]:
    headers = {"X-Request-ID": name} if name else {}
    answer = ask(api, "POST", "/v1/blister/inspect", content=data, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def listed(api: FastAPI, count: int, query: str = "") -> list[dict[str, object]]:
    """The list, once so many inspections are in it."""
    deadline = time.monotonic() + 20
    while True:
        answer = ask(api, "GET", f"/v1/blister/history{query}")
        assert answer.status_code == 200, answer.text
        inspections: list[dict[str, object]] = answer.json()["inspections"]
        if len(inspections) == count:
            return inspections
        assert time.monotonic() < deadline, len(inspections)
        time.sleep(0.05)


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(buffer, "PNG")
    return buffer.getvalue()


def test_an_inspection_is_kept_with_its_image_and_map(keeping: Keeping, category: Category) -> None:
    api, _, _ = keeping()
    assert ask(api, "GET", "/v1/blister/history").json()["inspections"] == []
    path = next(image.path for image in category.test if image.is_anomalous)
    report = inspect(api, path.read_bytes(), "part-7")
    (kept,) = listed(api, 1)
    same = {"category", "version", "threshold", "is_anomalous", "p_value", "regions", "request_id"}
    assert {name: kept[name] for name in same} == {name: report[name] for name in same}
    assert kept["regions"]
    assert kept["score"] == report["anomaly_score"]
    sent = read_image(path)
    assert (kept["width"], kept["height"]) == sent.size
    assert (kept["mark"], kept["note"], kept["marked_by"]) == (None, "", "")
    assert str(kept["at"]).endswith("+00:00")

    place = f"/v1/blister/history/{kept['id']}"
    image, anomaly_map = ask(api, "GET", f"{place}/image"), ask(api, "GET", f"{place}/map")
    assert image.headers["content-type"] == "image/jpeg"
    shown = Image.open(io.BytesIO(image.content))
    assert shown.size == sent.size  # smaller than 1024 pixels
    difference = np.asarray(shown, np.float32) - np.asarray(sent, np.float32)
    assert np.abs(difference).mean() < 6
    assert anomaly_map.headers["content-type"] == "image/png"
    map_HW = np.asarray(Image.open(io.BytesIO(anomaly_map.content)))
    assert map_HW.dtype == np.uint8
    assert max(map_HW.shape) == min(256, max(sent.size))
    worst = report["regions"][0]  # type: ignore[index]
    assert map_HW.max() / 255 == pytest.approx(worst["peak"], abs=0.05)


def test_large_images_are_kept_small(keeping: Keeping) -> None:
    api, _, _ = keeping()
    inspect(api, png(1500, 60))
    (kept,) = listed(api, 1)
    assert (kept["width"], kept["height"]) == (1500, 60)
    sides = [
        Image.open(io.BytesIO(ask(api, "GET", f"/v1/blister/history/{kept['id']}/{each}").content))
        for each in ("image", "map")
    ]
    assert [each.size for each in sides] == [(1024, 41), (256, 10)]


def test_inspections_are_listed_in_pages_newest_first(keeping: Keeping) -> None:
    api, _, _ = keeping()
    for number in range(5):
        inspect(api, png(), str(number))
    everything = listed(api, 5)
    assert [each["request_id"] for each in everything] == ["4", "3", "2", "1", "0"]
    ids = [int(str(each["id"])) for each in everything]
    assert sorted(ids, reverse=True) == ids
    page = listed(api, 2, f"?limit=2&before={ids[1]}")
    assert [each["id"] for each in page] == ids[2:4]
    assert len(listed(api, 5, "?only=rejected")) == 5
    assert listed(api, 0, "?only=marked") == []
    for wrong in ("limit=0", "limit=201", "only=some", "before=x", f"before={2**60}"):
        assert ask(api, "GET", f"/v1/blister/history?{wrong}").status_code == 422
    # As much in a new process, and by another registry nothing.
    again, _, _ = keeping()
    assert [each["id"] for each in listed(again, 5)] == ids


def test_a_verdict_is_marked_by_whom_a_token_names(keeping: Keeping) -> None:
    api, _, _ = keeping(AUTH)

    def by(name: str, method: str, path: str, **request: object) -> httpx.Response:
        return ask(api, method, path, headers={"Authorization": f"Bearer {name}"}, **request)

    assert by("one", "POST", "/v1/blister/inspect", content=png()).status_code == 200
    while not (kept := by("one", "GET", "/v1/blister/history").json()["inspections"]):
        time.sleep(0.05)
    place = f"/v1/blister/history/{kept[0]['id']}"
    wrong = {"verdict": "good", "note": "a reflection"}
    marked = by("one", "POST", f"{place}/mark", json=wrong)
    assert marked.json() == kept[0] | {"mark": "good", "note": "a reflection", "marked_by": "one"}
    assert by("all", "GET", "/v1/blister/history?only=marked").json()["inspections"] == [
        marked.json()
    ]
    cleared = by("all", "POST", f"{place}/mark", json={"verdict": None})
    assert cleared.json() == kept[0]
    for name, path, body, status in (
        ("other", f"{place}/mark", wrong, 403),
        ("boss", f"{place}/mark", wrong, 403),
        ("one", "/v1/blister/history/17/mark", wrong, 404),
        ("one", f"{place}/mark", {"verdict": "maybe"}, 422),
        ("one", f"{place}/mark", {"verdict": "good", "note": "x" * 501}, 422),
    ):
        answer = by(name, "POST", path, json=body)
        assert answer.status_code == status, answer.text
        assert answer.json()["remedy"]
    for each in ("", "/image", "/map"):
        path = f"{place}{each}" if each else "/v1/blister/history"
        assert by("other", "GET", path).status_code == 403
        assert by("one", "GET", path).status_code == 200
    assert by("one", "GET", "/v1/blister/history/17/image").status_code == 404


def test_the_last_ones_and_as_many_marked_ones_stay(keeping: Keeping) -> None:
    api, _, _ = keeping(images=2)
    inspect(api, png(), "first")
    (first,) = listed(api, 1)
    mark = {"verdict": "good"}
    assert ask(api, "POST", f"/v1/blister/history/{first['id']}/mark", json=mark).status_code == 200
    for name in ("second", "third", "fourth"):
        inspect(api, png(), name)
    deadline = time.monotonic() + 20
    while (names := [each["request_id"] for each in listed(api, 3)])[0] != "fourth":
        assert time.monotonic() < deadline
    assert names == ["fourth", "third", "first"]


def said(*, is_anomalous: bool) -> KeptCandidate:
    return KeptCandidate(version=8, score=0.5, threshold=0.4, is_anomalous=is_anomalous)


def keep(history: History, name: str, candidate: KeptCandidate | None) -> None:
    """An inspection of a defect."""
    report = InspectionReport.model_validate(
        {
            "category": "blister",
            "version": 7,
            "backbone": "fake",
            "regions": [],
            "anomaly_score": 0.9,
            "threshold": 0.4,
            "is_anomalous": True,
            "p_value": None,
            "certified_false_alarm_rate": None,
            "timings_ms": dict.fromkeys(("receive", "decode", "queue", "inspect", "conclude"), 0),
        }
    )
    history.keep(
        report,
        request_id=name,
        data=png(),
        limits=LIMITS.image,
        reading=UNTOLD,
        map_SS=torch.zeros(8, 8),
        candidate=candidate,
    )


def kept_by(history: History, only: Only = "all") -> list[KeptInspection]:
    found = history.history("blister", before=None, limit=50, only=only)
    return asyncio.run(found).inspections


def test_the_last_ones_on_which_a_candidate_disagrees_stay(tmp_path: Path) -> None:
    meter = Counted()
    settings = HistorySettings(images=2, folder=str(tmp_path))
    history = History(settings, "registry", disagreements=3, meter=meter)  # type: ignore[arg-type]
    for number in range(5):
        keep(history, f"apart-{number}", said(is_anomalous=False))
        keep(history, f"agreed-{number}", said(is_anomalous=True))
        keep(history, f"alone-{number}", None)
    deadline = time.monotonic() + 20
    while len(meter.outcomes) < 15:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    apart = kept_by(history, "disagreeing")
    assert [each.request_id for each in apart] == ["apart-4", "apart-3", "apart-2"]
    assert [each.candidate for each in apart] == [said(is_anomalous=False)] * 3
    others = [each for each in kept_by(history) if each.candidate is None]
    assert [each.request_id for each in others] == ["alone-4", "agreed-4"]
    # A mark keeps one beside the others, and what it says of the candidate with it.
    oldest = apart[-1].id
    marked = asyncio.run(history.mark("blister", oldest, Mark(verdict="good"), "one"))
    assert marked.candidate == said(is_anomalous=False)
    keep(history, "apart-5", said(is_anomalous=False))
    while kept_by(history)[0].request_id != "apart-5":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [each.id for each in kept_by(history, "marked")] == [oldest]
    assert len(kept_by(history, "disagreeing")) == 4


def test_without_a_history_only_disagreements_are_kept(keeping: Keeping, tmp_path: Path) -> None:
    settings = HistorySettings(images=0, folder=str(tmp_path / "history"))
    off = History(settings, "registry")
    keep(off, "apart", said(is_anomalous=False))
    history = History(settings, "registry", disagreements=2)
    keep(history, "agreed", said(is_anomalous=True))
    keep(history, "alone", None)
    assert kept_by(history, "disagreeing") == []
    with pytest.raises(ProblemError, match="keeps no inspections"):
        kept_by(history)
    assert not (tmp_path / "history").exists()
    keep(history, "apart", said(is_anomalous=False))
    deadline = time.monotonic() + 20
    while not kept_by(history, "disagreeing"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [each.request_id for each in kept_by(history)] == ["apart"]
    # What was kept while there was a history stays.
    api, _, _ = keeping()
    inspect(api, png(), "before")
    listed(api, 2)
    keep(history, "again", said(is_anomalous=False))
    while len(kept_by(history)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_file_of_an_earlier_version_is_read(keeping: Keeping, tmp_path: Path) -> None:
    api, _, history = keeping()
    inspect(api, png(), "before")
    listed(api, 1)
    (path,) = (tmp_path / "history").rglob("blister.sqlite")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE disagreements")
    assert [each.candidate for each in kept_by(history)] == [None]


def test_old_ones_are_neither_told_nor_kept(tmp_path: Path, keeping: Keeping) -> None:
    api, _, _ = keeping()
    inspect(api, png())
    (kept,) = listed(api, 1)
    folder = str(tmp_path / "history")
    settings = HistorySettings(images=100, days=30, folder=folder)
    in_a_month = History(settings, "registry", clock=lambda: time.time() + 31 * 86400)
    found = in_a_month.history("blister", before=None, limit=50, only="all")
    assert asyncio.run(found).inspections == []
    deadline = time.monotonic() + 20
    while ask(api, "GET", f"/v1/blister/history/{kept['id']}/image").status_code != 404:
        assert time.monotonic() < deadline  # it removes them without any traffic
        time.sleep(0.05)


def test_a_full_disk_fails_no_inspection_and_is_said_once(
    keeping: Keeping, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Counted()
    api, _, _ = keeping(meter=meter)
    inspect(api, png())
    listed(api, 1)
    with full_disk(10_000), caplog.at_level("WARNING", logger="ray.serve"):
        for _ in range(3):
            inspect(api, png(300, 300))
        deadline = time.monotonic() + 20
        while len(meter.outcomes) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert meter.outcomes == ["kept", "failed", "failed", "failed"]
    assert sum("make room" in record.message for record in caplog.records) == 1
    inspect(api, png())
    assert len(listed(api, 2)) == 2


def test_what_cannot_be_written_in_time_is_left_out(
    keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Counted()
    api, _, history = keeping(meter=meter)
    hold = threading.Event()
    monkeypatch.setattr(history, "_write", lambda kept: hold.wait())
    history._queue.maxsize = 1
    for _ in range(4):
        inspect(api, png())
    hold.set()
    # One is being written, one waits.
    assert meter.outcomes.count("dropped") >= 2


def test_files_are_for_their_owner_and_of_one_registry(keeping: Keeping, tmp_path: Path) -> None:
    api, _, _ = keeping()
    inspect(api, png())
    listed(api, 1)
    files = list((tmp_path / "history").rglob("*.sqlite*"))
    assert files
    for path in (*files, files[0].parent):
        assert path.stat().st_mode & 0o077 == 0, path
    settings = HistorySettings(images=100, folder=str(tmp_path / "history"))
    other = History(settings, "another registry")
    found = other.history("blister", before=None, limit=50, only="all")
    assert asyncio.run(found).inspections == []
    files[0].write_bytes(hashlib.sha256(b"damage").digest() * 1000)
    damaged = ask(api, "GET", "/v1/blister/history")
    assert (damaged.status_code, "cannot be read" in damaged.json()["detail"]) == (503, True)
    assert str(files[0].name) in damaged.json()["remedy"]


def test_without_a_history_its_routes_say_how_to_have_one(
    keeping: Keeping, prompt_set: PromptSet
) -> None:
    _, inspector, _ = keeping()
    direct = create_api(inspector, http=LIMITS, access=Access(Auth()))
    handed = root_of(Answering(inspector, NO_HISTORY))
    for api in (direct, handed):
        for method, path, body in (
            ("GET", "/v1/blister/history", None),
            ("GET", "/v1/blister/history/1/image", None),
            ("GET", "/v1/blister/history/1/map", None),
            ("POST", "/v1/blister/history/1/mark", {"verdict": "good"}),
        ):
            answer = ask(api, method, path, json=body)
            assert answer.status_code == 404
            assert "history: {images" in answer.json()["remedy"]

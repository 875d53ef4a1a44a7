"""Feedback over HTTP: given, refused, bounded, told, withdrawn; samples; versions made of it."""

import asyncio
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from apt_ray.data.feedback import Feedback
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import encode_jpeg
from apt_ray.registry import CANDIDATE, CHAMPION
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.pools import Answering
from serving.controller.orders import Order, StoredVersion
from serving.replica.history import History
from serving.settings import Auth, Decision, FeedbackSettings, HistorySettings
from tests.disks import full_disk
from tests.registry.fake import FakeRegistry
from tests.serving.engines import torch_inspector
from tests.serving.test_history import png
from tests.serving.test_moves import Desk
from tests.serving.test_root import LIMITS, ask, root_of, token

AUTH = Auth.parse(
    {
        "tokens": [
            token("line", "inspect", "feedback"),
            token("blister", "feedback:blister"),
            token("washer", "feedback:washer"),
            token("inspector", "inspect"),
            token("boss", "operate"),
        ]
    }
)
PLACE = "/v1/blister/feedback"

Keeping = Callable[..., FastAPI]


@pytest.fixture
def keeping(tmp_path: Path, prompt_set: PromptSet) -> Keeping:
    """A fleet to whom everything is a defect, or good, with a history and feedback."""

    def start(*, threshold: float = 0, auth: Auth = AUTH, **settings: Any) -> FastAPI:
        history = History(HistorySettings(images=100, folder=str(tmp_path / "history")), "registry")
        inspector = torch_inspector(limits=LIMITS.image, shared=True, history=history)
        stored = StoredVersion(
            category="blister", version=7, run_id="r", data=prompt_set.to_bytes()
        )
        decision = Decision(threshold=threshold)
        inspector.load("blister", Order(version=7, decision=decision), stored)
        store = FeedbackSettings(folder=str(tmp_path / "feedback"), **settings).store()
        return root_of(Answering(inspector, history), auth=auth, feedback=store)

    return start


def by(api: FastAPI, name: str, method: str, path: str, **request: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {name}"} | request.pop("headers", {})
    return ask(api, method, path, headers=headers, **request)


def inspect(api: FastAPI, *names: str) -> None:
    """Inspect an image for each name, and wait until the history has them."""
    for name in names:
        headers = {"Authorization": "Bearer line", "X-Request-ID": name}
        answer = ask(api, "POST", "/v1/blister/inspect", content=png(), headers=headers)
        assert answer.status_code == 200, answer.text
    until(lambda: {each["request_id"] for each in kept(api)} >= set(names))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kept(api: FastAPI) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = by(api, "line", "GET", "/v1/blister/history?limit=200").json()[
        "inspections"
    ]
    return found


def say(api: FastAPI, request: str, label: str, name: str = "line", **said: Any) -> httpx.Response:
    return by(api, name, "POST", PLACE, json={"request_id": request, "label": label, **said})


def form(request: str, label: str, image: bytes, **said: Any) -> dict[str, Any]:
    text = json.dumps({"request_id": request, "label": label, **said})
    return {"data": {"feedback": text}, "files": {"image": ("part.png", image)}}


def test_a_caller_says_what_a_part_was_and_takes_it_back(keeping: Keeping) -> None:
    api = keeping()
    inspect(api, "part-7")
    box = {"x": 1, "y": 2, "width": 39, "height": 28}
    given = say(api, "part-7", "false_alarm", kind="glare", boxes=[box], note="  the lamp ")
    assert given.status_code == 200, given.text
    told = given.json()
    (inspection,) = kept(api)
    assert (told["by"], told["label"], told["kind"], told["note"], told["boxes"]) == (
        ("line", "false_alarm", "glare", "the lamp", [box])
    )
    assert (told["width"], told["height"], told["source"], told["version"]) == (
        40,
        30,
        "history",
        7,
    )
    assert told["score"] == inspection["score"]
    assert (told["is_disputed"], told["is_used"]) == (False, False)
    again = say(api, "part-7", "false_alarm", kind="glare", boxes=[box], note="the lamp")
    assert again.json() == told
    for name in ("line", "blister", "boss"):
        assert by(api, name, "GET", PLACE).json()["feedback"] == [told]
    image = by(api, "boss", "GET", f"{PLACE}/{told['id']}/image")
    assert image.headers["content-type"] == "image/jpeg"
    shown = by(api, "line", "GET", f"/v1/blister/history/{inspection['id']}/image")
    assert image.content == shown.content
    assert by(api, "blister", "DELETE", f"{PLACE}/{told['id']}").status_code == 403
    assert by(api, "line", "DELETE", f"{PLACE}/{told['id']}").status_code == 204
    assert by(api, "boss", "DELETE", f"{PLACE}/{told['id']}").status_code == 404
    assert by(api, "line", "GET", PLACE).json()["feedback"] == []


def test_what_the_history_is_still_writing_is_waited_for(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(image: Image.Image, *, side: int) -> bytes:
        time.sleep(0.3)
        return encode_jpeg(image, side=side)

    monkeypatch.setattr("serving.replica.history.encode_jpeg", slowly)
    api = keeping()
    headers = {"Authorization": "Bearer line", "X-Request-ID": "part-7"}
    ask(api, "POST", "/v1/blister/inspect", content=png(), headers=headers)
    assert say(api, "part-7", "false_alarm").status_code == 200


def test_callers_who_disagree_are_seen(keeping: Keeping) -> None:
    api = keeping()
    inspect(api, "part-7", "part-8")
    assert say(api, "part-7", "false_alarm").status_code == 200
    other = say(api, "part-7", "confirmed_defect", "blister")
    assert other.json()["is_disputed"]
    say(api, "part-8", "false_alarm")
    told = by(api, "boss", "GET", PLACE).json()["feedback"]
    assert [each["is_disputed"] for each in told] == [False, True, True]
    assert [each["by"] for each in told] == ["line", "blister", "line"]
    page = by(api, "boss", "GET", f"{PLACE}?limit=1&before={told[0]['id']}").json()["feedback"]
    assert page == told[1:2]
    alarms = by(api, "boss", "GET", f"{PLACE}?label=false_alarm").json()["feedback"]
    assert alarms == [told[0], told[2]]
    # Who said it changes their mind.
    assert not say(api, "part-7", "false_alarm", "blister").json()["is_disputed"]


def test_an_image_comes_along_where_the_fleet_has_none(
    keeping: Keeping, category: Category
) -> None:
    api = keeping()
    unknown = say(api, "part-7", "missed_defect")
    assert (unknown.status_code, unknown.json()["title"]) == (404, "Unknown request")
    assert "Send the image along" in unknown.json()["remedy"]
    path = category.test[0].path
    sent = form("part-7", "missed_defect", path.read_bytes())
    told = by(api, "line", "POST", PLACE, **sent)
    assert told.status_code == 200, told.text
    assert (told.json()["source"], told.json()["score"]) == ("caller", None)
    image = by(api, "line", "GET", f"{PLACE}/{told.json()['id']}/image")
    assert (image.headers["content-type"], image.content) == ("image/png", path.read_bytes())
    # What the fleet has itself is more to be trusted than what is sent.
    inspect(api, "part-8")
    told = by(api, "line", "POST", PLACE, **form("part-8", "false_alarm", path.read_bytes()))
    assert told.json()["source"] == "history"


def test_of_several_images_of_one_request_one_is_named(keeping: Keeping) -> None:
    api = keeping()
    headers = {"Authorization": "Bearer line", "X-Request-ID": "form"}
    files = [("image", ("x.png", png(width), "image/png")) for width in (40, 50)]
    answer = ask(api, "POST", "/v1/blister/inspect", files=files, headers=headers)
    assert answer.status_code == 200
    until(lambda: len(kept(api)) == 2)
    refused = say(api, "form", "false_alarm")
    numbers = {each["id"]: each["width"] for each in kept(api)}
    assert (refused.status_code, refused.json()["title"]) == (409, "Several inspections")
    assert all(str(number) in refused.json()["remedy"] for number in numbers)
    told = [say(api, "form", "false_alarm", inspection=number).json() for number in numbers]
    assert [each["width"] for each in told] == list(numbers.values())
    assert len(by(api, "boss", "GET", PLACE).json()["feedback"]) == 2
    assert say(api, "form", "false_alarm", inspection=17).status_code == 404


def test_rubbish_is_refused_with_the_remedy(keeping: Keeping) -> None:
    api = keeping()
    inspect(api, "part-7")
    good = {"request_id": "part-7", "label": "false_alarm"}
    outside = {"x": 0, "y": 0, "width": 41, "height": 30}
    two = [("image", (f"{number}.png", png())) for number in range(2)]
    wrong = "Unsupported media type"
    cases: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("line", PLACE, {"json": good | {"label": "good"}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"label": "sampled"}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"by": "boss"}}, 422, "Invalid request"),
        ("line", PLACE, {"json": {"label": "false_alarm"}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"request_id": "a b"}}, 422, "Invalid request"),
        *(
            ("line", PLACE, {"json": good | {"kind": kind}}, 422, "Invalid request")
            for kind in ("a\nb", " a", "a ", "\u202ea", "x" * 65, "good", "OK", "a/b", 7)
        ),
        ("line", PLACE, {"json": good | {"inspection": "1"}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"inspection": True}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"boxes": [outside | {"x": "0"}]}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"boxes": [outside] * 51}}, 422, "Invalid request"),
        ("line", PLACE, {"json": good | {"boxes": [outside]}}, 422, "Box outside the image"),
        ("line", PLACE, {"json": good | {"label": "missed_defect"}}, 409, "Other verdict"),
        ("line", PLACE, {"content": b"\xff{"}, 422, "Invalid request"),
        ("line", PLACE, {"content": b" " * 70_000}, 413, "Message too large"),
        ("line", PLACE, {"content": b"BM", "headers": {"Content-Type": "image/png"}}, 415, wrong),
        ("line", PLACE, form("new", "false_alarm", b"BM") | {"files": two}, 413, "Too many images"),
        ("line", PLACE, {"files": {"image": ("x.png", png())}}, 400, "Bad form"),
        ("line", PLACE, form("new", "false_alarm", b"junk"), 400, "Not an image"),
        ("line", PLACE, form("new", "false_alarm", b"GIF89a"), 415, wrong),
        ("line", PLACE, form("new", "false_alarm", bytes(300_000)), 413, "Image too large"),
        ("line", "/v1/nut/feedback", {"json": good}, 404, "Unknown category"),
        ("washer", PLACE, {"json": good}, 403, "Forbidden"),
        ("inspector", PLACE, {"json": good}, 403, "Forbidden"),
        ("boss", PLACE, {"json": good}, 403, "Forbidden"),
        ("nobody", PLACE, {"json": good}, 401, "Unauthorized"),
        ("boss", f"{PLACE}/samples", {"json": {"images": 0}}, 422, "Invalid request"),
        ("boss", f"{PLACE}/samples", {"json": {"images": "1"}}, 422, "Invalid request"),
        ("boss", f"{PLACE}/samples", {"json": {"images": True}}, 422, "Invalid request"),
        ("boss", f"{PLACE}/samples", {"json": {"images": 50}}, 409, "Too few inspections"),
        ("line", f"{PLACE}/samples", {"json": {"images": 1}}, 403, "Forbidden"),
    ]
    for name, path, request, status, title in cases:
        answer = by(api, name, "POST", path, **request)
        assert (answer.status_code, answer.json()["title"]) == (status, title), (
            request,
            answer.text,
        )
        remedy = answer.json()["remedy"]
        assert remedy
        if path == PLACE and status in (400, 413, 415):
            assert "JSON" in remedy  # not what is to be sent for an inspection
    for path, status in (
        (f"{PLACE}/17/image", 404),
        (f"{PLACE}/..%2F..%2Fx/image", 404),
        (f"{PLACE}?limit=0", 422),
        (f"{PLACE}?label=good", 422),
        (f"{PLACE}?before=", 422),
        (f"{PLACE}?before=yesterday", 422),
        (f"{PLACE}?before=20261329T142530123456Z-false_alarm-{'0' * 16}-{'0' * 8}", 422),
    ):
        assert by(api, "line", "GET", path).status_code == status, path
    assert by(api, "inspector", "GET", PLACE).status_code == 403
    assert by(api, "line", "GET", PLACE).json()["feedback"] == []


def test_a_flood_a_full_store_and_a_full_disk_are_refused(
    keeping: Keeping, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = keeping(images=6, per_day=2)
    store = keeping(images=6, per_day=2)
    inspect(api, *(f"part-{number}" for number in range(5)))
    for number in range(2):
        assert say(api, f"part-{number}", "false_alarm").status_code == 200
    flood = say(store, "part-2", "false_alarm")
    assert (flood.status_code, flood.json()["title"]) == (429, "Feedback quota")
    assert int(flood.headers["retry-after"]) > 3600
    # Nothing that comes along is looked at.
    junk = by(store, "line", "POST", PLACE, **form("new", "false_alarm", b"junk"))
    assert junk.json()["title"] == "Feedback quota"
    (told, _) = by(api, "line", "GET", PLACE).json()["feedback"]
    assert by(api, "line", "DELETE", f"{PLACE}/{told['id']}").status_code == 204
    assert say(api, "part-2", "false_alarm").json()["title"] == "Feedback quota"
    noise = io.BytesIO()
    Image.effect_noise((300, 300), 80).save(noise, "PNG")
    with full_disk(50_000):
        full = by(api, "blister", "POST", PLACE, **form("new", "false_alarm", noise.getvalue()))
    assert (full.status_code, full.json()["title"]) == (503, "Feedback unavailable")
    assert str(tmp_path) not in full.text
    assert f"cannot write {tmp_path}" in caplog.text
    small = keeping(images=1)
    for sent in (
        {"json": {"request_id": "part-2", "label": "false_alarm"}},
        form("new", "false_alarm", b"junk"),
    ):
        full = by(small, "blister", "POST", PLACE, **sent)
        assert (full.status_code, full.json()["title"]) == (507, "Feedback full")


def test_a_store_that_is_broken_is_named_and_not_where_it_lies(
    keeping: Keeping, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = keeping()
    inspect(api, "part-7", "part-8")
    place = f"{PLACE}/{say(api, 'part-7', 'false_alarm').json()['id']}"
    (tmp_path / "feedback").rename(tmp_path / "away")
    (tmp_path / "feedback").write_text("no folder")
    for answer in (
        say(api, "part-8", "false_alarm"),
        by(api, "line", "GET", PLACE),
        by(api, "line", "GET", f"{PLACE}/samples"),
        by(api, "line", "GET", f"{place}/image"),
        by(api, "line", "DELETE", place),
        by(api, "boss", "POST", f"{PLACE}/samples", json={"images": 1}),
    ):
        told = answer.json()
        assert (answer.status_code, told["title"]) == (503, "Feedback unavailable"), told
        assert "the fleet's logs say why" in told["remedy"]
        assert int(answer.headers["retry-after"]) > 0
        assert str(tmp_path) not in answer.text
    assert f"cannot list {tmp_path}/feedback/blister: Not a directory" in caplog.text


def test_without_a_store_there_is_no_feedback(keeping: Keeping, prompt_set: PromptSet) -> None:
    inspector = torch_inspector(limits=LIMITS.image)
    stored = StoredVersion(category="blister", version=7, run_id="r", data=prompt_set.to_bytes())
    inspector.load("blister", Order(version=7), stored)
    api = create_api(inspector, http=LIMITS, access=Access(Auth()))
    answer = ask(api, "POST", PLACE, json={"request_id": "x", "label": "false_alarm"})
    assert (answer.status_code, answer.json()["title"]) == (404, "No feedback")


def test_a_sample_is_drawn_of_all_inspections_and_judged(keeping: Keeping) -> None:
    api = keeping(threshold=1)
    inspect(api, *(f"part-{number}" for number in range(6)))
    marked = kept(api)[-1]
    mark = by(
        api, "line", "POST", f"/v1/blister/history/{marked['id']}/mark", json={"verdict": "good"}
    )
    assert mark.status_code == 200
    drawn = by(api, "boss", "POST", f"{PLACE}/samples", json={"images": 4}).json()
    assert (drawn["images"], drawn["version"], len(drawn["left"])) == (4, 7, 4)
    waiting = by(api, "line", "GET", f"{PLACE}?label=sampled").json()["feedback"]
    assert sorted(each["id"] for each in waiting) == sorted(drawn["left"])
    for place, each in enumerate(waiting):
        label = "confirmed_good" if place else "missed_defect"
        assert say(api, each["request_id"], label).status_code == 200
    (told,) = by(api, "line", "GET", f"{PLACE}/samples").json()["samples"]
    assert (told["good"], told["defective"], told["left"], told["is_whole"]) == (3, 1, [], True)
    # Also what was marked, which stays longer; what is judged already stays so.
    everything = by(api, "boss", "POST", f"{PLACE}/samples", json={"images": 6}).json()
    assert len(everything["left"]) == 2


def test_operators_make_versions_of_it(
    tmp_path: Path, prompt_set: PromptSet, category: Category
) -> None:
    registry = FakeRegistry()
    support = category.support_set(3, seed=0)
    strict = prompt_set.with_threshold(prompt_set.threshold.moved_to(0.01))
    registry.register(strict, pictures={}, trials=[], support=support)
    settings = FeedbackSettings(folder=str(tmp_path / "feedback"))
    good = next(image.path for image in category.test if not image.is_anomalous)
    said = {
        "category": category.name,
        "request_id": "part-7",
        "label": "false_alarm",
        "by": "line",
        "width": 8,
        "height": 8,
        "source": "history",
    }
    alarm = settings.store().give(Feedback.parse(said), good.read_bytes(), "png")
    desk = Desk(registry, tmp_path / "cache", feedback=settings)
    name = category.name

    async def run() -> None:
        tried = await desk.move(name, "accept-feedback", dry_run=True)
        assert (tried["state"], tried["result"]["version"]) == ("done", 0), tried
        assert registry.versions(name) == [1]
        made = await desk.move(name, "accept-feedback", ids=[alarm.id])
        result = made["result"]
        assert (result["version"], result["verdict"], result["moved"]) == (2, "passes", False)
        assert "no confirmed defect speaks for or against it" in result["why"]
        assert "part-7 by line" in result["report"]
        assert registry.aliases()[name] == {CHAMPION: 1, CANDIDATE: 2}
        promoted = await desk.move(name, "promote")
        assert promoted["result"]["moved"], promoted
        assert registry.champions() == {name: 2}
        again = await desk.move(name, "accept-feedback")
        assert (again["state"], "the memory has it already" in again["error"]) == ("failed", True)
        back = await desk.move(name, "roll-back")
        assert back["result"]["version"] == 1
        none = await desk.move(name, "calibrate")
        assert "none was drawn" in none["error"]
        for body, status in (({"most": 0}, 422), ({"ids": 7}, 422), ({"reason": "x"}, 422)):
            refused = await desk.begin(name, "accept-feedback", **body)
            assert refused.status_code == status, refused.text

    asyncio.run(run())

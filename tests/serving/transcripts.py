"""Each kind of error as curl shows it.

`python -m tests.serving.transcripts docs/errors.md` writes it.
"""

import asyncio
import hashlib
import json
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from apt_ray.data.feedback import Feedback, FeedbackStore
from apt_ray.errors import DataError, FeedbackError, FeedbackQuotaError
from apt_ray.images import decode_image
from serving.api import problems
from serving.api.access import Access
from serving.api.history import KeptInspection, KeptInspections, NoHistory, Only, Picked, Wanted
from serving.api.ingress import create_api
from serving.api.messages import CategoryReport, Inspected, InspectionRequest
from serving.api.moves import add_moves
from serving.controller.moves import MoveOrder, Operation
from serving.controller.shadow import ShadowCounts, ShadowOrder, ShadowReport, Shadows
from serving.settings import Auth, HttpLimits
from tests.mutations import png_that_claims

URL = "http://127.0.0.1:8000"

_TOKEN = "the-token-of-line-3"
_LIMITS = HttpLimits(max_bytes=1000, max_pixels=1000, max_images=2, timeout_s=0.2)
_GIF = b"GIF89a"
_LARGE = png_that_claims(20_000, 20_000)
_FORM = {"Content-Type": "multipart/form-data; boundary=x"}
_JSON = {"Content-Type": "application/json"}
_FORM_PART = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="part.png"\r\n\r\nBM\r\n'
)


class _Scene:
    """A service that decodes as a replica does and then has one trouble after the other."""

    async def describe(self, category: str) -> CategoryReport:
        if category != "bottle":
            raise problems.unknown_category(category, ["bottle", "screw"])
        return CategoryReport(
            category=category,
            version=3,
            run_id="",
            backbone="builtin",
            fingerprint="",
            threshold=0.41,
            certified_false_alarm_rate=None,
            shots=4,
            trained_at="",
            settings={},
            metrics={},
        )

    async def inspect(self, category: str, data: bytes, asked: InspectionRequest) -> Inspected:
        if asked.alias is not None and category == "bottle":
            raise problems.no_version(category, asked.alias)
        if asked.alias is not None:
            raise problems.unusable(
                category,
                asked.alias,
                f"version 3 of {category} is damaged: fit the category again and register it",
            )
        if category == "flooded":
            raise problems.too_many(
                "64 images are waiting for this replica already, 64 of them of flooded: this"
                " one's turn would come in about 2.1 s, later than the 2 s accepted",
                retry_after_s=3,
            )
        if category == "busy":
            raise problems.overloaded(
                "64 images are waiting for this replica already: this one's turn would come in"
                " about 2.1 s, later than the 2 s accepted",
                retry_after_s=3,
            )
        if category == "new":
            raise problems.not_ready("new")
        if category == "broken":
            raise RuntimeError("what is wrong inside stays inside")
        if category == "nut":
            raise problems.unknown_category(category, ["bottle", "screw"])
        decode_image(data, limits=_LIMITS.image)
        raise AssertionError("every image here is bad")


class _NothingTried:
    """A controller without any candidate that was tried."""

    async def shadow(self, category: str) -> None:
        return None

    async def move(self, order: MoveOrder) -> Operation:
        order_of = ShadowOrder(champion=5, candidate=7, share=0.1, pair="7-5")
        shadows = Shadows()
        shadows.follow({order.category: order_of})
        counts = ShadowCounts(both_pass=301, both_reject=11, candidate_rejects=18)
        report = ShadowReport(id="one", pair="7-5", since=None, counts=counts)
        shadows.hear(order.category, report)
        shadows.require(order.category, images=1000, agreement=0.99, champion=5, candidate=7)
        raise AssertionError("it is refused")


class _Kept(NoHistory):
    """A history that has three inspections, and nothing on which a candidate disagreed."""

    async def history(
        self, category: str, *, before: int | None, limit: int, only: Only
    ) -> KeptInspections:
        return KeptInspections(node="node-1", inspections=[])

    async def pick(self, category: str, wanted: Wanted) -> list[Picked]:
        if wanted.request_id != "part-7":
            return []
        inspection = KeptInspection(
            id=1,
            at="",
            category=category,
            version=3,
            score=0.62,
            threshold=0.41,
            is_anomalous=True,
            p_value=None,
            regions=[],
            request_id=wanted.request_id,
            width=640,
            height=480,
            mark=None,
            note="",
            marked_by="",
        )
        return [Picked(inspection=inspection, jpeg=b"", of_request=1)]


class _Feedback(FeedbackStore):
    """A store that takes nothing."""

    def __init__(self) -> None:
        """It lies nowhere."""

    def drawn(self, category: str, request_id: str) -> Feedback | None:
        return None

    def check(self, category: str, by: str, requests: Collection[str], *, size: int = 0) -> None:
        if "part-8" in requests:
            raise FeedbackQuotaError(
                f"line-3 has said something of 200 images of {category} within 24 hours, as many as"
                " one may, withdrawn or not",
                retry_after_s=5400,
            )
        if "part-9" in requests:
            raise FeedbackError(f"1000 images of {category} are kept, and 1000 may be")
        if "part-10" in requests:
            raise DataError("cannot list /srv/feedback/bottle: Permission denied")


def _api(*, tokens: bool) -> FastAPI:
    digest = hashlib.sha256(_TOKEN.encode()).hexdigest()
    token = {"name": "line-3", "sha256": digest, "scopes": ["inspect:screw"]}
    auth = {"tokens": [token]} if tokens else {}
    access = Access(Auth.parse(auth))
    nothing: Any = _NothingTried()
    api = create_api(
        _Scene(),
        http=_LIMITS,
        access=access,
        history=_Kept(),
        controller=nothing,
        feedback=_Feedback(),
    )
    add_moves(api, nothing, access)
    return api


_SAID = {"request_id": "part-7", "label": "false_alarm"}


def _feedback(title: str, **said: object) -> tuple[str, str, str, bytes, dict[str, str], bool]:
    """A case of what is said of a part."""
    body = json.dumps(_SAID | said)
    return title, f"--json {shlex.quote(body)}", "bottle/feedback", body.encode(), _JSON, False


def _with_image(
    title: str, name: str, image: bytes
) -> tuple[str, str, str, bytes, dict[str, str], bool]:
    """A case of what is said of a part whose image comes along."""
    said = json.dumps(_SAID | {"request_id": "part-1"})
    body = (
        (
            f'--x\r\nContent-Disposition: form-data; name="feedback"\r\n\r\n{said}\r\n--x\r\n'
            f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        ).encode()
        + image
        + b"\r\n--x--"
    )
    options = f"-F feedback={shlex.quote(said)} -F image=@{name}"
    return title, options, "bottle/feedback", body, _FORM, False


_CASES: list[tuple[str, str, str, bytes, dict[str, str], bool]] = [
    ("not an image", "--data-binary @notes.txt", "bottle/inspect", b"hello", {}, False),
    (
        "a damaged image",
        "--data-binary @half.png",
        "bottle/inspect",
        b"\x89PNG\r\n\x1a\n",
        {},
        False,
    ),
    (
        "a form that lost its end",
        "-H 'Content-Type: multipart/form-data; boundary=x' --data-binary @half.form",
        "bottle/inspect",
        _FORM_PART,
        _FORM,
        False,
    ),
    (
        "an overlay of several images",
        "-H 'Accept: image/png' -F image=@part.png -F image=@other.png",
        "bottle/inspect",
        2 * _FORM_PART + b"--x--",
        _FORM | {"Accept": "image/png"},
        False,
    ),
    (
        "too many images",
        "-F image=@1.png -F image=@2.png -F image=@3.png",
        "bottle/inspect",
        3 * _FORM_PART + b"--x--",
        _FORM,
        False,
    ),
    ("no token", "--data-binary @part.png", "bottle/inspect", b"", {}, True),
    (
        "an unknown token",
        "-H 'Authorization: Bearer ...' --data-binary @part.png",
        "bottle/inspect",
        b"",
        {"Authorization": "Bearer ..."},
        True,
    ),
    (
        "a token for something else",
        "-H 'Authorization: Bearer '$TOKEN --data-binary @part.png",
        "bottle/inspect",
        b"",
        {"Authorization": f"Bearer {_TOKEN}"},
        True,
    ),
    ("an unknown category", "--data-binary @part.png", "nut/inspect", b"BM", {}, False),
    ("too many bytes", "--data-binary @film.png", "bottle/inspect", bytes(1001), {}, False),
    ("too many pixels", "--data-binary @huge.png", "bottle/inspect", _LARGE, {}, False),
    ("another kind of file", "--data-binary @part.gif", "bottle/inspect", _GIF, {}, False),
    (
        "another content type",
        "-H 'Content-Type: application/json' -d '{}'",
        "bottle/inspect",
        b"{}",
        {"Content-Type": "application/json"},
        False,
    ),
    (
        "a video file as a stream",
        "-H 'Content-Type: video/mp4' --data-binary @belt.mp4",
        "bottle/stream",
        b"",
        {"Content-Type": "video/mp4"},
        False,
    ),
    (
        "a wrong parameter",
        "-H 'X-Timeout-Ms: soon' --data-binary @part.png",
        "bottle/inspect",
        b"",
        {"X-Timeout-Ms": "soon"},
        False,
    ),
    (
        "one category too many at once",
        "--data-binary @part.png",
        "flooded/inspect",
        b"BM",
        {},
        False,
    ),
    ("all too many at once", "--data-binary @part.png", "busy/inspect", b"BM", {}, False),
    ("a category that is not ready", "--data-binary @part.png", "new/inspect", b"BM", {}, False),
    (
        "a candidate that is not there",
        "--data-binary @part.png",
        "bottle/inspect?alias=candidate",
        b"BM",
        {},
        False,
    ),
    (
        "a version that cannot inspect",
        "--data-binary @part.png",
        "screw/inspect?alias=candidate",
        b"BM",
        {},
        False,
    ),
    ("a candidate that is not tried", "", "bottle/shadow", b"", {}, False),
    (
        "a candidate that was not tried enough",
        '--json \'{"reason": "the new lamp"}\'',
        "/fleet/categories/bottle/promote",
        b'{"reason": "the new lamp"}',
        {"Content-Type": "application/json"},
        False,
    ),
    (
        "feedback that is neither JSON nor a form",
        "-H 'Content-Type: image/png' --data-binary @part.png",
        "bottle/feedback",
        b"BM",
        {"Content-Type": "image/png"},
        False,
    ),
    (
        "feedback that is too long",
        "--json @diary.json",
        "bottle/feedback",
        b" " * 70_000,
        _JSON,
        False,
    ),
    _with_image("feedback with an image that is too large", "huge.png", _LARGE),
    _with_image("feedback with another kind of file", "part.gif", _GIF),
    _with_image("feedback with a damaged image", "half.png", b"\x89PNG\r\n\x1a\n"),
    _feedback("feedback with a number as a text", inspection="1"),
    _feedback("feedback of a kind that is none", kind="good"),
    _feedback("feedback on a request that is not known", request_id="part-1"),
    _feedback(
        "feedback with a box outside the image",
        boxes=[{"x": 600, "y": 0, "width": 64, "height": 64}],
    ),
    _feedback("feedback that is of another verdict", label="missed_defect"),
    _feedback("feedback of a caller who has said enough", request_id="part-8"),
    _feedback("feedback for which there is no room", request_id="part-9"),
    _feedback("feedback while its folder cannot be read", request_id="part-10"),
    ("a fault of the fleet's own", "--data-binary @part.png", "broken/inspect", b"BM", {}, False),
]


def transcripts() -> str:
    """All of them, as Markdown."""
    parts = ["# Each kind of error, as curl shows it\n"]
    for title, options, address, body, headers, tokens in _CASES:
        method = "POST" if options else "GET"
        response = asyncio.run(_ask(_api(tokens=tokens), method, address, body, headers))
        shown = {
            name: value
            for name, value in response.headers.items()
            if name in ("content-type", "retry-after", "www-authenticate")
        }
        parts.append(
            f"## {title[0].upper()}{title[1:]}\n\n```console\n"
            f"$ {' '.join(filter(None, ('curl -i', options, shlex.quote(URL + _path(address)))))}\n"
            f"HTTP/1.1 {response.status_code} {response.reason_phrase}\n"
            + "".join(f"{name}: {value}\n" for name, value in sorted(shown.items()))
            + f"\n{json.dumps(response.json(), indent=2)}\n```\n"
        )
    return "\n".join(parts)


async def _ask(
    served: FastAPI, method: str, address: str, body: bytes, headers: dict[str, str]
) -> httpx.Response:
    transport = httpx.ASGITransport(served, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
        return await client.request(method, _path(address), content=body, headers=headers)


def _path(address: str) -> str:
    return address if address.startswith("/") else f"/v1/{address}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(transcripts())

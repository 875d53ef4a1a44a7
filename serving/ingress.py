"""The HTTP routes of a category, and what all routes share: tokens, limits, problems.

The paths are written in full, so the same routes serve a category's own application, mounted at
`/v1/<category>`, and the root application, mounted at `/`.
"""

import asyncio
import base64
import hashlib
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from apt_ray.images import draw_overlay, encode_png
from serving import problems
from serving.messages import (
    CategoryReport,
    InspectedImage,
    InspectionReport,
    RegionReport,
    Service,
    Timings,
)
from serving.problems import Problem, ProblemError
from serving.settings import Auth, HttpLimits

IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp")
MULTIPART = "multipart/form-data"
# Besides image/*, what clients send when they do not say what the body is; the second is curl's.
_UNNAMED_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
# Room for the boundaries and headers of a form around its file.
_FORM_OVERHEAD = 64 * 2**10

T = TypeVar("T")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY = {
    "required": True,
    "content": {
        **dict.fromkeys(IMAGE_TYPES, _BINARY),
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": _BINARY["schema"]},
            }
        },
    },
}


def problem_responses(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the problems that a route may answer with."""
    return {
        int(status): {
            "description": status.phrase,
            "content": {problems.MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status in statuses
    }


_COMMON_PROBLEMS = problem_responses(
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


def create_api(service: Service, *, http: HttpLimits, auth: Auth) -> FastAPI:
    """The API of categories that `service` answers for."""
    api = FastAPI(
        title="apt-ray",
        summary="Finds defects in pictures of products.",
        docs_url=None,  # FastAPI's pages load scripts from the internet; the console has its own
        redoc_url=None,
    )
    api.add_middleware(_FullPaths)
    problems.install(api)
    authorized = [Depends(require_token(auth))]

    @api.post(
        "/v1/{category}/inspect",
        tags=["categories"],
        summary="Inspect one image",
        description="The body is a PNG, JPEG, BMP, TIFF or WebP file, raw or as a file of a"
        " multipart form. With `Accept: image/png` the answer is the overlay: the image with what"
        " is unusual tinted and outlined.",
        dependencies=authorized,
        response_model=InspectionReport,
        openapi_extra={"requestBody": _REQUEST_BODY},
        responses={
            200: {"content": {"image/png": _BINARY}},
            **_COMMON_PROBLEMS,
            **problem_responses(
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.REQUEST_TIMEOUT,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            ),
        },
    )
    async def inspect(
        category: str,
        request: Request,
        picture: Annotated[
            Literal["png", "overlay"] | None,
            Query(
                alias="map",
                description="Adds a picture to the answer: `png` the anomaly map (16-bit gray,"
                " 65535 is 1.0), `overlay` the overlay.",
            ),
        ] = None,
    ) -> Response:
        started = time.monotonic()
        data = await _within(
            http.timeout_s,
            read_image_file(request, max_bytes=http.max_bytes),
            ProblemError(
                HTTPStatus.REQUEST_TIMEOUT,
                "Request timeout",
                f"the image did not arrive within {http.timeout_s:g} s",
                "Send a smaller image, or use a faster connection.",
                headers={"Connection": "close"},
            ),
        )
        received = time.monotonic()
        inspected = await _within(
            http.timeout_s - (received - started),
            service.inspect(category, data),
            problems.overloaded(f"the image could not be inspected within {http.timeout_s:g} s"),
        )
        wants_overlay = _prefers_png(request.headers.get("accept", ""))
        picture_png = await asyncio.to_thread(
            _draw, inspected, "overlay" if wants_overlay else picture
        )
        headers = {"Vary": "Accept"}
        if wants_overlay:
            return Response(
                picture_png,
                media_type="image/png",
                headers=headers | _verdict_headers(inspected),
            )
        report = _report(
            inspected,
            request_id=request.headers.get("x-request-id") or uuid.uuid4().hex,
            receive_ms=1000 * (received - started),
            picture_png=picture_png,
        )
        return Response(report.model_dump_json(), media_type="application/json", headers=headers)

    @api.get(
        "/v1/{category}",
        tags=["categories"],
        summary="What answers for a category",
        dependencies=authorized,
        responses=_COMMON_PROBLEMS,
    )
    async def describe(category: str) -> CategoryReport:
        return await service.describe(category)

    return api


def require_token(auth: Auth) -> Callable[..., Awaitable[None]]:
    """A dependency that lets a request pass only with one of the tokens; all if there are none."""
    hashes = [token.sha256 for token in auth.tokens]
    bearer = HTTPBearer(auto_error=False, description="A token of the fleet file.")

    async def check(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> None:
        if not hashes:
            return
        if credentials is None:
            raise _unauthorized("the request carries no token", "Bearer")
        digest = hashlib.sha256(credentials.credentials.encode()).hexdigest()
        # Every hash is compared, so the time taken does not tell which one was close.
        if sum(hmac.compare_digest(digest, known) for known in hashes) == 0:
            raise _unauthorized("the token is not known here", 'Bearer error="invalid_token"')

    return check


async def read_image_file(request: Request, *, max_bytes: int) -> bytes:
    """The bytes of the image file in the request's body, raw or in a multipart form.

    Raises ProblemError for another content type, a body that is too large (as soon as that is
    known) and one without a file.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == MULTIPART:
        body = await _read_body(request, max_bytes + _FORM_OVERHEAD)
        return await _file_of_form(request, body)
    if media_type in _UNNAMED_TYPES or media_type.startswith("image/"):
        return await _read_body(request, max_bytes)
    raise problems.unsupported(f"the body is {media_type}, not an image")


class _FullPaths:
    """Undoes the route prefix that Serve mounts an application at; the routes contain it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = ""
        await self._app(scope, receive, send)


def _unauthorized(detail: str, challenge: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.UNAUTHORIZED,
        "Unauthorized",
        detail,
        "Send the header 'Authorization: Bearer <token>'; whoever runs the fleet makes tokens with"
        " `python -m serving.fleet token`.",
        headers={"WWW-Authenticate": challenge},
    )


async def _within(seconds: float, work: Awaitable[T], otherwise: ProblemError) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise otherwise from None


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = problems.too_large(f"the body has more than the {limit:,} bytes accepted")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise problems.not_an_image("the connection was closed before the body's end") from None
    return bytes(body)


async def _file_of_form(request: Request, body: bytes) -> bytes:
    async def replay() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, replay).form(max_files=1) as form:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    raise problems.not_an_image("the form has no file")


def _prefers_png(accept: str) -> bool:
    media_types = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return "image/png" in media_types and "application/json" not in media_types


def _draw(inspected: InspectedImage, kind: Literal["png", "overlay"] | None) -> bytes | None:
    if kind is None:
        return None
    inspection = inspected.inspection
    if kind == "png":
        return encode_png(_gray16(inspection.anomaly_map))
    return encode_png(
        draw_overlay(inspected.image, inspection.anomaly_map, threshold=inspection.threshold)
    )


def _gray16(map_HW: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.rint(map_HW * 65535).astype(np.uint16))


def _report(
    inspected: InspectedImage,
    *,
    request_id: str,
    receive_ms: float,
    picture_png: bytes | None,
) -> InspectionReport:
    about, inspection = inspected.about, inspected.inspection
    return InspectionReport(
        category=about.category,
        version=about.version,
        backbone=about.backbone,
        anomaly_score=inspection.anomaly_score,
        threshold=inspection.threshold,
        is_anomalous=inspection.is_anomalous,
        p_value=inspection.p_value,
        certified_false_alarm_rate=about.certified_false_alarm_rate,
        regions=[
            RegionReport(
                x=region.x,
                y=region.y,
                width=region.width,
                height=region.height,
                peak=region.peak,
                area=region.area,
            )
            for region in inspection.regions
        ],
        request_id=request_id,
        timings_ms=Timings(
            receive=round(receive_ms, 2),
            decode=round(inspected.decode_ms, 2),
            queue=round(inspected.queue_ms, 2),
            inspect=round(inspected.inspect_ms, 2),
        ),
        map_png=None if picture_png is None else base64.b64encode(picture_png).decode(),
    )


def _verdict_headers(inspected: InspectedImage) -> dict[str, str]:
    inspection = inspected.inspection
    return {
        "X-Anomaly-Score": f"{inspection.anomaly_score:.6f}",
        "X-Threshold": f"{inspection.threshold:.6f}",
        "X-Is-Anomalous": str(inspection.is_anomalous).lower(),
        "X-Prompt-Set-Version": str(inspected.about.version),
    }

"""The HTTP routes of a category, which its own application and the root application share.

The paths are written in full, so the same routes serve an application mounted at `/v1/<category>`
and one mounted at `/`. Whether the service behind them is in this process or another makes no
difference to what they answer.
"""

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, get_args

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from pydantic import WithJsonSchema
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from apt_ray.data.feedback import FeedbackStore
from apt_ray.errors import ImageError
from serving.api import problems
from serving.api.access import INSPECT, Access, require
from serving.api.bodies import (
    BINARY,
    CLIENT_CLOSED_REQUEST,
    IMAGE_TYPES,
    MULTIPART,
    GoneError,
    read_image_files,
    unless_gone,
)
from serving.api.feedback import add_feedback
from serving.api.headers import PassedHeaders, quality
from serving.api.history import NO_HISTORY, HistoryService, add_history
from serving.api.messages import (
    Alias,
    CategoryReport,
    Explanation,
    Inspected,
    InspectionReport,
    InspectionReports,
    InspectionRequest,
    Picture,
    Service,
)
from serving.api.problems import COMMON_PROBLEMS, Problem, ProblemError, problem_responses
from serving.api.shadow import add_shadow
from serving.api.streams import add_streams
from serving.controller.client import ControllerClient
from serving.logs import logger
from serving.settings import HttpLimits

_REQUEST_BODY = {
    "required": True,
    "content": {
        **dict.fromkeys(IMAGE_TYPES, BINARY),
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "items": BINARY["schema"]}},
            }
        },
    },
}


def create_api(
    service: Service,
    *,
    http: HttpLimits,
    access: Access,
    history: HistoryService = NO_HISTORY,
    controller: ControllerClient | None = None,
    feedback: FeedbackStore | None = None,
) -> FastAPI:
    """The API of categories that `service` answers for.

    Without a controller nothing is told of candidates that are tried, and without a store no
    feedback is taken.
    """
    api = FastAPI(
        title="apt-ray",
        summary="Finds defects in images of products.",
        docs_url=None,  # FastAPI's pages load scripts from the internet; the console has its own
        redoc_url=None,
    )
    api.add_middleware(_Routing, root_path=http.root_path)
    api.add_middleware(PassedHeaders)
    if http.allow_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=http.allow_origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers="*",
            expose_headers="*",
        )
    problems.install(api)
    authorized = [Depends(require(access, INSPECT))]

    @api.post(
        "/v1/{category}/inspect",
        tags=["categories"],
        summary="Inspect one image or several",
        description="The body is a PNG, JPEG, BMP, TIFF or WebP file, raw or as a file of a"
        " multipart form. Several files in one form give `{inspections: [...]}`, a report or a"
        " problem for each, in order. With `Accept: image/png` the answer is the overlay of the one"
        " image: what is unusual tinted and outlined. With `alias` another version answers than the"
        " one that serves, by the threshold and region of interest that the fleet file gives.",
        dependencies=authorized,
        response_model=InspectionReport | InspectionReports,
        openapi_extra={"requestBody": _REQUEST_BODY},
        responses={
            200: {"content": {"image/png": BINARY}},
            **COMMON_PROBLEMS,
            **problem_responses(
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.NOT_ACCEPTABLE,
                HTTPStatus.REQUEST_TIMEOUT,
                HTTPStatus.CONFLICT,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                HTTPStatus.TOO_MANY_REQUESTS,
            ),
        },
    )
    async def inspect(
        category: str,
        request: Request,
        picture: Annotated[
            Picture | None,
            WithJsonSchema({"type": "string", "enum": get_args(Picture)}),  # a URL knows no null
            Query(
                alias="map",
                description="Adds an image to the answer: `png` the anomaly map (16-bit gray,"
                " 65535 is 1.0), `overlay` the overlay.",
            ),
        ] = None,
        alias: Annotated[
            Alias | None,
            WithJsonSchema({"type": "string", "enum": get_args(Alias)}),
            Query(
                description="Asks the version behind this alias of the registry, and counts nowhere"
                " as an inspection of the last hour. The first image waits until it is loaded."
            ),
        ] = None,
        map_side: Annotated[
            int | None,
            WithJsonSchema({"type": "integer", "minimum": 64, "maximum": 4096}),
            Query(
                ge=64,
                le=4096,
                description="The longer side, in pixels, to which that image is reduced; without"
                " it, or if it is larger, it has the size of the image sent. Regions are in pixels"
                " of the image sent in any case.",
            ),
        ] = None,
        timeout_ms: Annotated[
            int | None,
            WithJsonSchema({"type": "integer", "minimum": 1}),
            Header(
                alias="X-Timeout-Ms",
                ge=1,
                description="Milliseconds for which the answer is of use; after them, or when it is"
                " plain that they will not do, the answer is 503. Without it an image is not let"
                " wait for longer than the fleet file says (max_wait_s).",
            ),
        ] = None,
        request_id: Annotated[
            str,
            Header(
                alias="X-Request-ID",
                description="The name of this request in the answer and in the logs: 1 to 128"
                " visible ASCII characters. For anything else the fleet makes one of its own.",
            ),
        ] = "",
    ) -> Response:
        request_id = request_id or uuid.uuid4().hex
        started = time.monotonic()
        # Compared before it is divided: no float is as large as an integer may be.
        limit_ms = 1000 * http.timeout_s
        seconds = min(timeout_ms or limit_ms, limit_ms) / 1000
        files = await read_image_files(request, http)
        received = time.monotonic()
        accept = request.headers.get("accept", "")
        json_quality = quality(accept, "application/json")
        wants_overlay = quality(accept, "image/png") > json_quality
        if wants_overlay and len(files) > 1:
            if not json_quality[0]:
                raise problems.not_acceptable(
                    "an overlay is of one image, and the form has several",
                    "Accept application/json, or send one image.",
                )
            wants_overlay = False

        async def answer(data: bytes) -> Inspected:
            left = max(seconds - (time.monotonic() - started), 0.001)
            asked = InspectionRequest(
                id=request_id,
                picture="overlay" if wants_overlay else picture,
                picture_side=map_side,
                timeout_s=left if timeout_ms is not None else None,
                alias=alias,
            )
            try:
                return await asyncio.wait_for(service.inspect(category, data, asked), left)
            except asyncio.TimeoutError:
                raise problems.overloaded(
                    f"the image could not be inspected within {seconds:g} s"
                ) from None

        try:
            if len(files) == 1:
                inspected = _completed(
                    await unless_gone(request, answer(files[0])),
                    request_id=request_id,
                    receive_ms=1000 * (received - started),
                )
                return _overlay(inspected) if wants_overlay else _json(inspected.report)
            found = await unless_gone(request, _each(answer, files))
        except GoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return _json(
            InspectionReports(
                inspections=[
                    each
                    if isinstance(each, Problem)
                    else _completed(
                        each, request_id=request_id, receive_ms=1000 * (received - started)
                    ).report
                    for each in found
                ]
            )
        )

    @api.post(
        "/v1/{category}/explain",
        tags=["categories"],
        summary="Say what the verdict on an image rests on",
        description="The body is one image, as for `inspect`. Of each region: what it looks like,"
        " and the place of the support images that is most like it. Maps of the prompts and of the"
        " reference memory. It counts nowhere as an inspection, and takes some times as long.",
        dependencies=authorized,
        openapi_extra={"requestBody": _REQUEST_BODY},
        responses={
            **COMMON_PROBLEMS,
            **problem_responses(
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.REQUEST_TIMEOUT,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                HTTPStatus.TOO_MANY_REQUESTS,
            ),
        },
    )
    async def explain(category: str, request: Request) -> Explanation:
        files = await read_image_files(request, http)
        if len(files) > 1:
            raise problems.bad_form("the form has several images, and one is explained at a time")
        try:
            return await asyncio.wait_for(
                service.explain(category, files[0], InspectionRequest()), http.timeout_s
            )
        except asyncio.TimeoutError:
            raise problems.overloaded(
                f"the image could not be explained within {http.timeout_s:g} s"
            ) from None

    @api.get(
        "/v1/{category}",
        tags=["categories"],
        summary="What answers for a category",
        dependencies=authorized,
        responses=COMMON_PROBLEMS,
    )
    async def describe(category: str) -> CategoryReport:
        return await service.describe(category)

    add_streams(api, service, http=http, access=access)
    add_history(api, history, access)
    if controller is not None:
        add_shadow(api, controller, history, access)
    add_feedback(api, feedback, service, history, http=http, access=access)
    return api


class _Routing:
    """Shows the routes a request as they are written: with the whole path, and GET for HEAD.

    Serve mounts an application at its route prefix, which the routes contain. The fleet's prefix
    was taken off on the way here, and ASGI wants it in the path. Servers leave out the body of
    what answers HEAD.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, method = self._root_path + scope["path"], scope["method"]
            scope = {  # a copy: the server's own still tells it that this is a HEAD
                **scope,
                "root_path": self._root_path,
                "path": path,
                "method": "GET" if method == "HEAD" else method,
            }
        await self._app(scope, receive, send)


async def _each(
    answer: Callable[[bytes], Awaitable[Inspected]], files: list[bytes]
) -> list[Inspected | Problem]:
    """An answer for each image: what is wrong with one is no other's problem, but a category that
    is unknown is that of all."""

    async def one(data: bytes) -> Inspected | Problem:
        try:
            return await answer(data)
        except ProblemError as error:
            if error.problem.status == HTTPStatus.NOT_FOUND:
                raise
            return error.problem
        except ImageError as error:
            return problems.of_image(error).problem

    return await asyncio.gather(*(one(data) for data in files))


def _completed(inspected: Inspected, *, request_id: str, receive_ms: float) -> Inspected:
    report = inspected.report
    report.request_id = request_id
    report.timings_ms.receive = round(receive_ms, 2)
    if inspected.picture_png is not None:
        report.map_png = base64.b64encode(inspected.picture_png).decode()
    _log(report)
    return inspected


def _json(report: InspectionReport | InspectionReports) -> Response:
    return Response(
        report.model_dump_json(), media_type="application/json", headers={"Vary": "Accept"}
    )


def _overlay(inspected: Inspected) -> Response:
    report = inspected.report
    return Response(
        inspected.picture_png,
        media_type="image/png",
        headers={
            "Vary": "Accept",
            "X-Anomaly-Score": f"{report.anomaly_score:.6f}",
            "X-Threshold": f"{report.threshold:.6f}",
            "X-Is-Anomalous": str(report.is_anomalous).lower(),
            "X-Prompt-Set-Version": str(report.version),
        },
    )


def _log(report: InspectionReport) -> None:
    """Log what an image was found to be."""
    logger.info(
        "inspected",
        extra={
            "request": report.request_id,
            "category": report.category,
            "version": report.version,
            "anomaly_score": round(report.anomaly_score, 6),
            "is_anomalous": report.is_anomalous,
            "timings_ms": report.timings_ms.model_dump(),
        },
    )

"""The root application: the list of categories, health, operation, the console and the API's docs.

It runs without torch. Requests for categories that share a pool come through here and go on by
handle, as do those for a category whose own application is not there yet or no more.
"""

import hashlib
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from apt_ray.data.feedback import FeedbackStore
from serving.api import problems, webhooks
from serving.api.access import OPERATE, Access, Caller, require
from serving.api.drift import add_drift
from serving.api.headers import is_current
from serving.api.ingress import create_api
from serving.api.moves import add_moves, told
from serving.api.pools import Pools
from serving.api.problems import problem_responses
from serving.api.thresholds import add_thresholds
from serving.api.tuning import Tuning, add_tuning_routes
from serving.api.version_pictures import add_version_pictures
from serving.controller.client import ControllerClient
from serving.controller.orders import FleetStatus, State
from serving.settings import HttpLimits

READY = ("READY", "IDLE")
"""States of a category that answers, the second after its pool has started a replica."""

_CONSOLE = Path(__file__).parents[1] / "console"
# Exactly these addresses show the console, whose router looks which of them it is.
_CONSOLE_PATHS = (
    "/",
    "/searches",
    "/c/{category}",
    *(f"/c/{{category}}/{tab}" for tab in ("inspect", "history", "versions", "tune")),
)
# A browser asks each time whether its copy is the last: a new fleet has a new console at once.
_FILE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
_PAGE_HEADERS = {
    # Nothing but this server: no foreign or inline script or style, no text that becomes markup,
    # no frame, no address to send images to.
    "Content-Security-Policy": "default-src 'self'; connect-src 'self'; img-src 'self' blob: data:;"
    " object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    **_FILE_HEADERS,
}


_POLLED = " The answer has an ETag: with it in If-None-Match, 304 says that all is as it was then."
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "As it was."}}


class CategoryLink(BaseModel):
    """A category that the fleet serves."""

    category: str
    inspect: str = Field(description="Where to POST an image of it.")
    status: State = Field(
        description="READY; LOADING while replicas differ from the registry; IDLE without any"
        " replica until the next request; FAILED if the registry's version cannot be served."
    )


class CategoryList(BaseModel):
    categories: list[CategoryLink]


class Health(BaseModel):
    status: str


class Me(BaseModel):
    """Who asks, as the fleet knows them."""

    name: str = Field(description="Of the token; empty where the fleet has no tokens.")
    scopes: list[str] = Field(description="What it is good for.")
    needs_token: bool = Field(description="Whether the fleet asks for tokens at all.")


class AuditLog(BaseModel):
    lines: list[dict[str, Any]] = Field(description="The last operations, oldest first.")


def create_root_api(
    pools: Pools,
    controller: ControllerClient,
    *,
    http: HttpLimits,
    access: Access,
    webhook_secret: str,
    tuning: Tuning | None = None,
    feedback: FeedbackStore | None = None,
) -> FastAPI:
    """The API of the whole fleet.

    Args:
        pools: Answers for the categories.
        control: The controller.
        http: Limits of requests.
        access: Who may ask.
        webhook_secret: What MLflow signs its webhooks with; empty if it sends none.
        tuning: Images to learn from, and searches; None where the fleet file turns them off.
        feedback: What people say of images; likewise.
    """
    api = create_api(
        pools, http=http, access=access, history=pools, controller=controller, feedback=feedback
    )
    if tuning is not None:
        add_tuning_routes(api, tuning, http=http, access=access)
    anyone = [Depends(require(access))]
    operators = [Depends(require(access, OPERATE))]
    refusals = problem_responses(HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    unavailable = problem_responses(HTTPStatus.SERVICE_UNAVAILABLE)

    async def status() -> FleetStatus:
        return await told(controller.status())

    @api.get(
        "/v1",
        tags=["fleet"],
        summary="The categories",
        description="For any token." + _POLLED,
        dependencies=anyone,
        response_model=CategoryList,
        responses={
            **_NOT_MODIFIED,
            **problem_responses(HTTPStatus.UNAUTHORIZED),
            **unavailable,
        },
    )
    async def list_categories(request: Request) -> Response:
        found = (await status()).categories
        prefix = request.scope["root_path"]
        categories = CategoryList(
            categories=[
                CategoryLink(
                    category=name,
                    inspect=f"{prefix}/v1/{name}/inspect",
                    status=category.state,
                )
                for name, category in found.items()
            ]
        )
        return _unless_current(request, categories)

    @api.get(
        "/fleet/me",
        tags=["fleet"],
        summary="Who asks, and what for",
        description="Any token is told its name and scopes; without one, where the fleet asks for"
        " tokens, the answer is 401.",
        responses=problem_responses(HTTPStatus.UNAUTHORIZED),
    )
    async def me(caller: Annotated[Caller, Depends(require(access))]) -> Me:
        return Me(name=caller.name, scopes=list(caller.scopes), needs_token=access.needs_token)

    @api.get("/healthz", tags=["fleet"], summary="Whether the fleet answers at all")
    async def healthz() -> Health:
        return Health(status="ok")

    @api.get(
        "/readyz",
        tags=["fleet"],
        summary="Whether every category is ready to inspect",
        responses=unavailable,
    )
    async def readyz() -> Health:
        found = (await status()).categories
        # A version that cannot be loaded leaves the one before it in service.
        waiting = [
            name
            for name, category in found.items()
            if category.state not in READY and not category.serving
        ]
        if waiting:
            raise problems.not_ready(", ".join(waiting))
        return Health(status="ok")

    @api.get(
        "/fleet/status",
        tags=["operation"],
        summary="What every category serves, and why not what it should",
        description="With the last hour of each, and the candidate that waits."
        + _POLLED
        + " `polled_s_ago` alone is no change.",
        dependencies=operators,
        response_model=FleetStatus,
        responses={**_NOT_MODIFIED, **refusals, **unavailable},
    )
    async def fleet_status(request: Request) -> Response:
        return _unless_current(request, await status(), beside={"polled_s_ago"})

    @api.get(
        "/fleet/audit",
        tags=["operation"],
        summary="The last operations",
        dependencies=operators,
        responses={**refusals, **unavailable},
    )
    async def audit() -> AuditLog:
        await status()
        return AuditLog(lines=await controller.audit_lines())

    @api.post(
        "/fleet/refresh",
        tags=["operation"],
        summary="Ask the registry now",
        dependencies=operators,
        responses={**refusals, **unavailable},
    )
    async def refresh() -> Health:
        await status()
        await controller.wake("refresh")
        return Health(status="ok")

    add_moves(api, controller, access)
    add_version_pictures(api, controller, access)
    add_thresholds(api, pools, controller, access)
    add_drift(api, pools, controller, access)

    @api.post("/webhooks/mlflow", include_in_schema=False)
    async def webhook(request: Request) -> Health:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > webhooks.MAX_BYTES:
                raise problems.too_large("the delivery is larger than any that MLflow sends")
        delivery = webhooks.verify(request.headers, bytes(body), secret=webhook_secret)
        await status()
        await controller.wake(f"webhook {delivery}")
        return Health(status="ok")

    def page(name: str) -> HTMLResponse:
        # Pages of any depth link from the fleet's own address on.
        text = (_CONSOLE / name).read_text(encoding="utf-8")
        text = text.replace('"/console/', f'"{http.root_path}/console/')
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    for path in _CONSOLE_PATHS:

        @api.get(path, include_in_schema=False)
        def console() -> HTMLResponse:
            return page("index.html")

    @api.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return page("docs.html")

    api.mount("/console", _Files(directory=_CONSOLE))
    return api


class _Files(StaticFiles):
    """The console's files, each with an etag."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_FILE_HEADERS)
        return response


def _unless_current(
    request: Request, content: BaseModel, *, beside: set[str] | None = None
) -> Response:
    """The content, or that the caller has it already, where fields `beside` it do not count."""
    kept = content.model_dump_json(exclude=beside)
    # Weak: what does not count may differ.
    etag = f'W/"{hashlib.sha256(kept.encode()).hexdigest()[:16]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if is_current(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(content.model_dump_json(), media_type="application/json", headers=headers)

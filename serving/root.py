"""The root application: the list of categories, health, the console and the API's description.

It runs without torch. Requests for a category reach it only while that category has no application
of its own; it answers them with what is the matter.
"""

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.staticfiles import StaticFiles

from serving import problems
from serving.ingress import create_api, problem_responses, require_token
from serving.messages import CategoryReport, InspectedImage
from serving.problems import ProblemError
from serving.settings import Auth, HttpLimits

RUNNING = "RUNNING"

_CONSOLE = Path(__file__).parent / "console"
_PAGE_HEADERS = {
    # Nothing but this server: no foreign script, no frame, no address to send pictures to.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:;"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class CategoryLink(BaseModel):
    """A category that the fleet serves."""

    category: str
    inspect: str = Field(description="Where to POST an image of it.")
    status: str = Field(description="Ray Serve's word for its application; RUNNING is good.")


class CategoryList(BaseModel):
    categories: list[CategoryLink]


class Health(BaseModel):
    status: str


class AbsentCategories:
    """The service behind the root's category routes: none of them is served from here."""

    def __init__(self, categories: tuple[str, ...]) -> None:
        self._categories = categories

    async def describe(self, category: str) -> CategoryReport:
        self._explain(category)

    async def inspect(self, category: str, data: bytes) -> InspectedImage:
        self._explain(category)

    def _explain(self, category: str) -> NoReturn:
        if category in self._categories:
            raise _not_ready(category)
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "Unknown category",
            f"the fleet has no category {category!r}",
            f"Use one of: {', '.join(self._categories)}.",
        )


def create_root_api(
    categories: tuple[str, ...],
    statuses: Callable[[], Mapping[str, str]],
    *,
    http: HttpLimits,
    auth: Auth,
) -> FastAPI:
    """The API of the whole fleet.

    Args:
        categories: Their names.
        statuses: Asks Ray Serve for the status of each category's application; may block.
        http: Limits of requests.
        auth: Who may ask.
    """
    api = create_api(AbsentCategories(categories), http=http, auth=auth)

    async def links() -> list[CategoryLink]:
        found = await asyncio.to_thread(statuses)
        return [
            CategoryLink(
                category=category,
                inspect=f"/v1/{category}/inspect",
                status=found.get(category, "NOT_STARTED"),
            )
            for category in categories
        ]

    @api.get(
        "/v1",
        tags=["fleet"],
        summary="The categories",
        dependencies=[Depends(require_token(auth))],
        responses=problem_responses(HTTPStatus.UNAUTHORIZED),
    )
    async def list_categories() -> CategoryList:
        return CategoryList(categories=await links())

    @api.get("/healthz", tags=["fleet"], summary="Whether the fleet answers at all")
    async def healthz() -> Health:
        return Health(status="ok")

    @api.get(
        "/readyz",
        tags=["fleet"],
        summary="Whether every category is ready to inspect",
        responses=problem_responses(HTTPStatus.SERVICE_UNAVAILABLE),
    )
    async def readyz() -> Health:
        if waiting := [link.category for link in await links() if link.status != RUNNING]:
            raise _not_ready(*waiting)
        return Health(status="ok")

    @api.get("/", include_in_schema=False)
    async def console() -> FileResponse:
        return FileResponse(_CONSOLE / "index.html", headers=_PAGE_HEADERS)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_CONSOLE / "docs.html", headers=_PAGE_HEADERS)

    api.mount("/console", StaticFiles(directory=_CONSOLE))
    return api


def _not_ready(*categories: str) -> ProblemError:
    return problems.busy(
        f"not ready: {', '.join(categories)}",
        if_it_lasts="`python -m serving.fleet status` tells why",
        retry_after_s=5,
    )

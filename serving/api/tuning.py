"""The routes by which a product is tuned from the outside: images to learn from, and searches."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Query, Request, Response
from pydantic import WithJsonSchema

from apt_ray.config import CATEGORY_NAME
from apt_ray.errors import FleetError, ImageError, WriteError
from serving.api import problems
from serving.api.access import OPERATE, Access, Caller, require
from serving.api.bodies import read_image_files
from serving.api.problems import COMMON_PROBLEMS, ProblemError, problem_responses
from serving.api.searches import (
    Searches,
    SearchList,
    SearchReport,
    SearchRequest,
    SearchRunsError,
    UnknownSearchError,
)
from serving.api.training_images import AddedImages, FullError, TrainingImages
from serving.settings import CategoryName, HttpLimits

_Found = TypeVar("_Found")

_BAD_BODIES = problem_responses(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.INSUFFICIENT_STORAGE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What the routes of tuning work on."""

    searches: Searches
    images: TrainingImages


def add_tuning_routes(api: FastAPI, tuning: Tuning, *, http: HttpLimits, access: Access) -> None:
    """Let callers with the scope `operate` send images, and start, follow and stop searches."""
    operator = Annotated[Caller, Depends(require(access, OPERATE))]
    images, searches = tuning.images, tuning.searches

    @api.get(
        "/fleet/categories/{category}/images",
        tags=["tuning"],
        summary="The normal images that were sent to learn from",
        responses=COMMON_PROBLEMS,
    )
    async def list_images(category: CategoryName, _: operator) -> AddedImages:
        return AddedImages(images=await _in_thread(lambda: images.of(category)), copies=0)

    @api.post(
        "/fleet/categories/{category}/images",
        tags=["tuning"],
        summary="Send normal images to learn from",
        description="A body as for inspection: one image file, or several in a multipart form. The"
        " category need not exist yet. An image that is there already, by its pixels, is not kept"
        " twice.",
        responses={**COMMON_PROBLEMS, **_BAD_BODIES},
    )
    async def add_images(category: CategoryName, request: Request, _: operator) -> AddedImages:
        files = await read_image_files(request, http)
        return await _in_thread(lambda: images.add(category, files))

    @api.get(
        "/fleet/categories/{category}/images/{name}",
        tags=["tuning"],
        summary="One of them, small",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, **COMMON_PROBLEMS},
    )
    async def show_image(category: CategoryName, name: str, _: operator) -> Response:
        small = await _in_thread(lambda: images.small(category, name))
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(small, media_type="image/jpeg", headers=headers)

    @api.delete(
        "/fleet/categories/{category}/images/{name}",
        tags=["tuning"],
        summary="Strike one out",
        responses=COMMON_PROBLEMS,
    )
    async def remove_image(category: CategoryName, name: str, _: operator) -> AddedImages:
        await _in_thread(lambda: images.remove(category, name))
        return AddedImages(images=await _in_thread(lambda: images.of(category)), copies=0)

    @api.post(
        "/fleet/searches",
        tags=["tuning"],
        summary="Search the best settings of a category, as a Ray job",
        description="The winner is registered as candidate: of the category's versions, the one"
        " whose `search` is this id. With `dry_run` nothing is searched: `estimate` says what the"
        " search would take, once that has been timed.",
        status_code=HTTPStatus.ACCEPTED,
        responses={**COMMON_PROBLEMS, **problem_responses(HTTPStatus.CONFLICT)},
    )
    async def start_search(wanted: SearchRequest, caller: operator) -> SearchReport:
        return await _in_thread(
            lambda: searches.start(wanted, by=caller.name, images=images.folder)
        )

    @api.get(
        "/fleet/searches",
        tags=["tuning"],
        summary="The searches that were started here",
        responses=COMMON_PROBLEMS,
    )
    async def list_searches(
        _: operator,
        category: Annotated[
            CategoryName | None,
            WithJsonSchema({"type": "string", "pattern": f"^{CATEGORY_NAME}$"}),
            Query(description="Only those of this category."),
        ] = None,
    ) -> SearchList:
        return SearchList(searches=await _in_thread(lambda: searches.newest_first(category)))

    @api.get(
        "/fleet/searches/{search}",
        tags=["tuning"],
        summary="One of them, with the end of its log",
        responses=COMMON_PROBLEMS,
    )
    async def find_search(search: str, _: operator) -> SearchReport:
        return await _in_thread(lambda: searches.find(search))

    @api.delete(
        "/fleet/searches/{search}",
        tags=["tuning"],
        summary="Have one end; the best so far becomes the candidate",
        responses=COMMON_PROBLEMS,
    )
    async def stop_search(search: str, caller: operator) -> SearchReport:
        return await _in_thread(lambda: searches.stop(search, by=caller.name))


async def _in_thread(work: Callable[[], _Found]) -> _Found:
    """What `work`, which waits for disks or for Ray, gives; its errors as problems."""
    try:
        return await asyncio.to_thread(work)
    except FileNotFoundError as error:
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "Unknown image",
            f"there is no image {error}",
            "Ask for the list of the category's images.",
        ) from None
    except UnknownSearchError as error:
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "Unknown search",
            f"Ray knows of no search {error}",
            "Ask for the list of searches; Ray forgets them when its head is started anew.",
        ) from None
    except SearchRunsError as error:
        raise ProblemError(
            HTTPStatus.CONFLICT, "Search runs", str(error), "Wait for it, or stop it."
        ) from None
    except FullError as error:
        raise ProblemError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "Too many images",
            str(error),
            "Strike some out, or raise max_images under searches in the fleet file.",
        ) from None
    except ImageError as error:
        raise problems.of_image(error) from None
    except WriteError as error:
        raise ProblemError(
            HTTPStatus.INSUFFICIENT_STORAGE,
            "Not kept",
            str(error),
            "Make room, or name another folder under searches in the fleet file.",
        ) from None
    except FleetError as error:
        raise problems.busy(
            str(error), if_it_lasts="look at Ray's dashboard", retry_after_s=5
        ) from None

"""Errors as a caller sees them: `application/problem+json` (RFC 9457) with a remedy."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from apt_ray.errors import (
    ImageError,
    ImageTooLargeError,
    RegistryError,
    RegistryUnavailableError,
    UnsupportedImageError,
)
from serving.logs import logger

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """What went wrong with a request, and what to do about it."""

    type: str = Field(description="A stable name of the kind of problem.")
    title: str = Field(description="The kind of problem in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened this time.")
    remedy: str = Field(description="What to do.")


class ProblemError(Exception):
    """Ends a request with a problem."""

    def __init__(
        self,
        status: HTTPStatus,
        kind: str,
        detail: str,
        remedy: str,
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.problem = Problem(
            type=f"urn:apt-ray:problem:{kind.lower().replace(' ', '-')}",
            title=kind,
            status=status,
            detail=detail,
            remedy=remedy,
        )
        self.headers = headers

    @classmethod
    def of(cls, problem: Problem, headers: dict[str, str] | None) -> "ProblemError":
        """The error that was turned into a problem elsewhere."""
        error = cls(HTTPStatus(problem.status), problem.title, problem.detail, problem.remedy)
        error.headers = headers
        return error

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(
            self.problem.model_dump(),
            status_code=self.problem.status,
            headers=self.headers,
            media_type=MEDIA_TYPE,
        )


def problem_responses(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the problems that a route may answer with."""
    return {
        int(status): {
            "description": status.phrase,
            "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status in statuses
    }


COMMON_PROBLEMS = problem_responses(
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


def busy(detail: str, *, if_it_lasts: str, retry_after_s: int = 1) -> ProblemError:
    """The fleet cannot answer now but soon will."""
    return ProblemError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "Busy",
        detail,
        f"Ask again in {retry_after_s} s; if it lasts, {if_it_lasts}.",
        headers={"Retry-After": str(retry_after_s)},
    )


def overloaded(detail: str, *, retry_after_s: int = 1) -> ProblemError:
    """More is asked than the replicas can inspect."""
    return busy(
        detail,
        if_it_lasts="raise max_replicas or max_wait_s in the fleet file",
        retry_after_s=retry_after_s,
    )


def too_many(detail: str, *, retry_after_s: int = 1) -> ProblemError:
    """More is asked of one category than its share of the pool."""
    return ProblemError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "Too many requests",
        detail,
        f"Ask again in {retry_after_s} s; if it lasts, raise max_wait_s in the fleet file, or give"
        " the category a pool of its own.",
        headers={"Retry-After": str(retry_after_s)},
    )


def not_ready(what: str, *, reason: str = "") -> ProblemError:
    """A category that the fleet has is not served yet."""
    return busy(
        f"not ready: {what}{f' ({reason})' if reason else ''}",
        if_it_lasts="`python -m serving.fleet status` tells why",
        retry_after_s=5,
    )


def unknown_category(category: str, known: Iterable[str]) -> ProblemError:
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        "Unknown category",
        f"the fleet has no category {category!r}",
        f"Use one of: {', '.join(sorted(known)) or 'none yet'}.",
    )


def of_registry(error: RegistryError) -> ProblemError:
    """Why the registry does not do what is asked of it."""
    if isinstance(error, RegistryUnavailableError):
        return ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "Registry unavailable",
            str(error),
            "Ask again once the registry is back; until then the fleet serves as it does now.",
            headers={"Retry-After": "10"},
        )
    return ProblemError(
        HTTPStatus.CONFLICT,
        "Refused by the registry",
        str(error),
        "Look at what the registry has, `GET /fleet/categories/<category>/versions`, and decide"
        " again.",
    )


def no_version(category: str, alias: str) -> ProblemError:
    """A category whose registry has nothing under an alias."""
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        f"No {alias}",
        f"{category} has no {alias}",
        "Ask without alias for the version that serves. A search registers a candidate, and"
        " `apt-ray registry promote` makes it the champion.",
    )


def not_tried_enough(detail: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.CONFLICT,
        "Not tried enough",
        detail,
        "Let the candidate be tried on more images (`shadow` in the fleet file), and look at those"
        " on which both disagree, `GET /v1/<category>/shadow`; or promote it with `force`.",
    )


def unusable(category: str, alias: str, reason: str) -> ProblemError:
    """A version that somebody asked for cannot be served."""
    return ProblemError(
        HTTPStatus.CONFLICT,
        "Unusable version",
        f"the {alias} of {category} cannot inspect ({reason})",
        "Ask without alias for the version that serves; fit and register the category again.",
    )


def of_image(error: ImageError) -> ProblemError:
    """What is wrong with an image, as a problem."""
    if isinstance(error, ImageTooLargeError):
        return too_large(str(error))
    if isinstance(error, UnsupportedImageError):
        return unsupported(str(error))
    return not_an_image(str(error))


def too_large(detail: str, *, what: str = "image") -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"{what.capitalize()} too large",
        detail,
        "Send a smaller or more compressed image, or raise max_bytes or max_pixels in the fleet"
        " file.",
    )


def too_many_images(limit: int) -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "Too many images",
        f"the form has more than the {limit} images accepted",
        "Send them in several requests, or raise max_images in the fleet file.",
    )


def not_acceptable(detail: str, remedy: str) -> ProblemError:
    return ProblemError(HTTPStatus.NOT_ACCEPTABLE, "Not acceptable", detail, remedy)


def bad_form(detail: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.BAD_REQUEST,
        "Bad form",
        detail,
        "Send a whole multipart/form-data body, each image a part of it with a file name, as"
        " `curl -F image=@part.png` does.",
    )


def not_an_image(detail: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.BAD_REQUEST,
        "Not an image",
        detail,
        "Send one undamaged image file as the body, or as a file of a multipart form.",
    )


def invalid(
    detail: str, remedy: str = "Correct the named parameters; /docs lists what is accepted."
) -> ProblemError:
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "Invalid request", detail, remedy)


def described(errors: Iterable[Mapping[str, Any]]) -> str:
    """What Pydantic finds wrong, each with its place."""
    found = []
    for each in errors:
        place, what = ".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {what}" if place else what)
    return "; ".join(found)


def no_stream(detail: str) -> ProblemError:
    """A body that is no stream of frames."""
    return ProblemError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "Not a stream",
        detail,
        "Send JPEG or PNG files one behind the other, or multipart/x-mixed-replace of them; of a"
        " video file `ffmpeg -i VIDEO -f image2pipe -c:v mjpeg -q:v 2 - | curl -T - ...` makes"
        " them.",
    )


def too_many_streams(limit: int) -> ProblemError:
    return busy(
        f"this replica watches the {limit} streams that it may",
        if_it_lasts="raise max_streams or max_replicas in the fleet file",
        retry_after_s=5,
    )


def too_fast(limit: int) -> ProblemError:
    """Frames come faster than they can be inspected."""
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "Too fast",
        f"more than the {limit:,} bytes accepted wait to be inspected",
        "Send frames more slowly, or look at fewer of them (`every`), or let the oldest be dropped"
        " (`live=true`), or raise max_ahead_bytes in the fleet file.",
    )


def stream_too_long(limit_s: float) -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_TIMEOUT,
        "Stream too long",
        f"the stream has lasted the {limit_s:g} s that it may",
        "Begin another one, or raise max_s in the fleet file.",
    )


def unsupported(detail: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "Unsupported media type",
        detail,
        "Send a PNG, JPEG, BMP, TIFF or WebP file.",
    )


def install(api: FastAPI) -> None:
    """Makes every error of `api` a problem."""

    @api.exception_handler(ProblemError)
    async def known(_: Request, error: ProblemError) -> JSONResponse:
        return error.response

    @api.exception_handler(ImageError)
    async def bad_image(_: Request, error: ImageError) -> JSONResponse:
        return of_image(error).response

    @api.exception_handler(RequestValidationError)
    async def wrong_parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(described(error.errors())).response

    @api.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        return ProblemError(
            status,
            status.phrase,
            f"{request.method} {request.url.path}: {error.detail}",
            "See /docs for the addresses and methods that exist.",
            headers=dict(error.headers or {}),
        ).response

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ProblemError(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "Internal error",
            "The request failed for a reason that is not its own.",
            "Ask again; if it persists, look for the x-request-id of this answer in the logs of"
            " the replica.",
        ).response

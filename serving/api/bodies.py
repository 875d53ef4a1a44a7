"""Reading requests: image files from raw bodies and forms, and callers that go away."""

import asyncio
from collections.abc import Awaitable, MutableMapping
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from serving.api import problems
from serving.api.problems import ProblemError
from serving.settings import HttpLimits

IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp")
MULTIPART = "multipart/form-data"
# Besides image/*, what clients send when they do not say what the body is; the second is curl's.
_UNNAMED_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
# Room for the boundaries and headers of a form around each of its files.
_FORM_OVERHEAD = 16 * 2**10

T = TypeVar("T")


class GoneError(Exception):
    """The caller closed the connection: nobody waits for the answer."""


async def read_image_files(request: Request, limits: HttpLimits) -> list[bytes]:
    """The image files in the request's body: one if it is raw, one or more if it is a form.

    Raises ProblemError for another content type, a body that is too large (as soon as that is
    known), one without a file or with too many, and one that does not arrive in time.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = media_type == MULTIPART
    if not (is_form or media_type in _UNNAMED_TYPES or media_type.startswith("image/")):
        raise problems.unsupported(f"the body is {media_type}, not an image")
    limit = limits.max_bytes + is_form * limits.max_images * _FORM_OVERHEAD
    try:
        body = await asyncio.wait_for(_read_body(request, limit), limits.timeout_s)
    except asyncio.TimeoutError:
        raise ProblemError(
            HTTPStatus.REQUEST_TIMEOUT,
            "Request timeout",
            f"the image did not arrive within {limits.timeout_s:g} s",
            "Send a smaller image, or use a faster connection.",
            headers={"Connection": "close"},
        ) from None
    return await _files_of_form(request, body, limits.max_images) if is_form else [body]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled if the caller goes away, which raises GoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return await task
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


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


async def _files_of_form(request: Request, body: bytes, max_images: int) -> list[bytes]:
    async def replay() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, replay).form(max_files=max_images + 1) as form:
        files = [value for value in form.multi_items() if isinstance(value[1], UploadFile)]
        if not files:
            raise problems.not_an_image("the form has no file")
        if len(files) > max_images:
            raise problems.too_large(f"the form has more than the {max_images} images accepted")
        return [await file.read() for _, file in files if isinstance(file, UploadFile)]

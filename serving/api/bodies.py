"""Reading requests: image files from raw bodies and forms, and callers that go away."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from http import HTTPStatus
from typing import TypeVar

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serving.api import problems
from serving.api.problems import ProblemError
from serving.settings import HttpLimits

IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp")
MULTIPART = "multipart/form-data"
BINARY = {"schema": {"type": "string", "format": "binary"}}
"""A file in a body, as OpenAPI says it."""
# Besides image/*, what clients send when they do not say what the body is; the second is curl's.
_UNNAMED_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
# Room for the boundaries and headers of a form around each of its files.
_FORM_OVERHEAD = 16 * 2**10
# A few thousand characters of text, and fifty boxes.
_MESSAGE_BYTES = 64 * 2**10
# No limit has more digits, and int() refuses thousands of them.
_DIGITS = 18

CLIENT_CLOSED_REQUEST = 499
"""nginx's code for it; the caller that closed the connection never sees it."""

T = TypeVar("T")


class GoneError(Exception):
    """The caller closed the connection: nobody waits for the answer."""


async def read_image_files(request: Request, limits: HttpLimits) -> list[bytes]:
    """The image files in the request's body: one if it is raw, one or more if it is a form.

    Raises ProblemError for another content type, a body that is too large (as soon as that is
    known), one that does not arrive in time, and a form that is damaged, has lost its end, or has
    no file or too many.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = media_type == MULTIPART
    if not (is_form or media_type in _UNNAMED_TYPES or media_type.startswith("image/")):
        raise problems.unsupported(f"the body is {media_type}, not an image")
    limit = limits.max_bytes + is_form * limits.max_images * _FORM_OVERHEAD
    body = await _read_in_time(request, limit, limits)
    if not is_form:
        return [body]
    _, files = await _read_form(request.headers, body, limits.max_images)
    if not files:
        raise problems.bad_form("the form has no file")
    return files


async def read_message(request: Request, limits: HttpLimits, field: str) -> tuple[str, list[bytes]]:
    """The JSON of a body, and the image files that came with it: the body itself, without any, or
    the field of that name in a form.

    Raises ProblemError as `read_image_files` does.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == MULTIPART:
        body = await _read_in_time(request, limits.max_bytes + _MESSAGE_BYTES, limits)
        values, files = await _read_form(request.headers, body, limits.max_images)
        if field not in values:
            raise problems.bad_form(f"the form has no field {field!r}")
        return values[field], files
    if media_type not in ("application/json", *_UNNAMED_TYPES):
        raise problems.unsupported(f"the body is {media_type}, neither JSON nor a form")
    data = await _read_in_time(request, _MESSAGE_BYTES, limits, what="message")
    return data.decode("utf-8", "replace"), []


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


async def _read_in_time(
    request: Request, limit: int, limits: HttpLimits, *, what: str = "image"
) -> bytes:
    try:
        return await asyncio.wait_for(_read_body(request, limit, what), limits.timeout_s)
    except asyncio.TimeoutError:
        raise ProblemError(
            HTTPStatus.REQUEST_TIMEOUT,
            "Request timeout",
            f"the {what} did not arrive within {limits.timeout_s:g} s",
            "Send a smaller image, or use a faster connection.",
            headers={"Connection": "close"},
        ) from None


async def _read_body(request: Request, limit: int, what: str) -> bytes:
    too_large = problems.too_large(
        f"the body has more than the {limit:,} bytes accepted", what=what
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:_DIGITS]) > limit:
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


class _Form(MultiPartParser):
    """A form that knows whether its closing boundary came."""

    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


async def _read_form(
    headers: Headers, body: bytes, max_images: int
) -> tuple[dict[str, str], list[bytes]]:
    """The fields of a form that are text, and its files."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body
        if not form.has_ended:
            raise MultiPartException("Its closing boundary is missing: it has lost its end.")

    form = _Form(headers, whole(), max_files=max_images + 1)
    damage = ""
    try:
        await form.parse()
    except MultiPartException as error:
        damage = error.message
    except UnicodeError:  # names in a character set that the header claims, of no interest here
        damage = "Its names are not in the character set that its Content-Type claims."
    # What was read before the damage counts: a form with too many files is given up early.
    files = [value for _, value in form.items if isinstance(value, UploadFile)]
    try:
        if len(files) > max_images:
            raise problems.too_many_images(max_images)
        if damage:
            raise problems.bad_form(f"the form cannot be read: {damage}")
        values = {name: value for name, value in form.items if isinstance(value, str)}
        return values, [await file.read() for file in files]
    finally:
        for file in files:
            await file.close()

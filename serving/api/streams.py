"""The route of streams: frames in as they come, events out as they happen, on one connection.

What a stream knows of its frames lives here, where its connection ends; each frame that has to be
inspected goes to the service as any image does, one at a time, so that it waits its turn among
images and other streams.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from apt_ray.errors import ImageError, ImageTooLargeError, SettingsError
from apt_ray.images import decode_image
from apt_ray.video.events import Event, EventLevels
from apt_ray.video.frames import Every
from apt_ray.video.splitter import ImageSplitter
from apt_ray.video.watch import Look, Watch, WatchSummary, event_regions
from serving.api import problems
from serving.api.access import INSPECT, Access, require
from serving.api.bodies import BINARY, CLIENT_CLOSED_REQUEST, GoneError
from serving.api.messages import CategoryReport, Inspected, InspectionRequest, Service
from serving.api.problems import COMMON_PROBLEMS, Problem, ProblemError, problem_responses
from serving.settings import HttpLimits

LINES = "application/x-ndjson"
_TYPES = ("multipart/x-mixed-replace", "image/jpeg", "image/png", "application/octet-stream")
# Besides these, what clients send when they do not say what the body is.
_UNNAMED_TYPES = ("", "application/x-www-form-urlencoded", "video/x-motion-jpeg")
_PROGRESS_S = 10.0
_RETRY_S = 1.0


class StreamSummary(WatchSummary):
    """What a stream came to."""

    dropped: int = Field(description="Frames that came faster than they could be inspected.")


class StreamLine(BaseModel):
    """One line of the answer; exactly one of its fields is there."""

    event: Event | None = Field(default=None, description="Something begins, or is over.")
    progress: StreamSummary | None = Field(default=None, description="Every 10 s: it goes on.")
    problem: Problem | None = Field(default=None, description="Why the stream ends early.")
    summary: StreamSummary | None = Field(default=None, description="The last line.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    index: int
    time_s: float
    file: bytes
    is_cut_off: bool


def add_streams(api: FastAPI, service: Service, *, http: HttpLimits, access: Access) -> None:
    """Add the route to an API whose categories `service` answers for."""
    limits = http.streams
    streams = 0

    async def done(frames: _Frames) -> None:
        nonlocal streams
        streams -= 1
        await frames.close()

    @api.post(
        "/v1/{category}/stream",
        tags=["categories"],
        summary="Inspect a stream of frames",
        description="The body is JPEG or PNG files one behind the other, as `ffmpeg -f image2pipe`"
        " writes them, or `multipart/x-mixed-replace`, as cameras send it; it may go on for as long"
        " as `http.streams.max_s` in the fleet file says. The answer begins with the first frame: a"
        " line of JSON for each event that begins or is over, and a summary at the end, which also"
        " says whether the body ended within a frame. Frames that did not change, or show no whole"
        " part, are not inspected. They count in no history and no drift.",
        dependencies=[Depends(require(access, INSPECT))],
        response_class=_Described,
        response_model=StreamLine,
        openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys(_TYPES, BINARY)}},
        responses={
            200: {"description": "Lines of JSON, each like this."},
            **COMMON_PROBLEMS,
            **problem_responses(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            ),
        },
    )
    async def stream(
        category: str,
        request: Request,
        fps: Annotated[
            float | None,
            Query(
                gt=0,
                le=100_000,
                description="Frames in a second, for the times of events; without it they are those"
                " at which the frames come.",
            ),
        ] = None,
        every: Annotated[
            str,
            Query(
                pattern=r"^(\d{1,9}|(\d{1,9}(\.\d{0,9})?|\.\d{1,9})s)$",
                description="Look at each so many-th frame, or, as in `0.2s`, at one in so many"
                " seconds.",
            ),
        ] = "1",
        part: Annotated[
            Literal["whole", "any"],
            Query(
                description="`whole`: where the good pictures show a part on a ground, inspect the"
                " frames that show one as whole as they do; `any`: inspect all frames."
            ),
        ] = "whole",
        live: Annotated[
            bool,
            Query(
                description="Whether frames that come faster than they are inspected are dropped,"
                " the oldest first; else they end the stream."
            ),
        ] = False,
    ) -> Response:
        nonlocal streams
        try:
            sampling = Every.parse(every)
        except SettingsError as error:
            raise problems.invalid(str(error)) from None
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in (*_TYPES, *_UNNAMED_TYPES):
            raise problems.no_stream(f"the body is {media_type}")
        about = await service.describe(category)
        if streams >= limits.max_streams:
            raise problems.too_many_streams(limits.max_streams)
        watch = Watch(_levels(about), limits, part=about.part if part == "whole" else None)
        frames = _Frames(request, http, every=sampling, fps=fps, live=live)
        streams += 1
        try:
            await frames.start()
        except GoneError:
            await done(frames)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            await done(frames)
            raise
        lines = _Stream(service, category, about, watch, frames, http).lines()
        return _Lines(lines, done=partial(done, frames))


class _Described(JSONResponse):
    """For OpenAPI, which takes other classes for text."""

    media_type = LINES


class _Lines(StreamingResponse):
    """Sends lines as they come; the body of the request is left to whoever makes them."""

    media_type = LINES

    def __init__(self, lines: AsyncIterator[bytes], *, done: Callable[[], Awaitable[None]]) -> None:
        super().__init__(lines)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not Starlette's own, which would read the body to hear of the caller's leaving.
        try:
            await self.stream_response(send)
        finally:
            await self._done()


class _Frames:
    """The frames of a request's body, read as they come, so that nothing piles up before us.

    Ray Serve reads a body without an end into memory, as fast as it comes; what holds it back are
    the limits here.
    """

    def __init__(
        self, request: Request, http: HttpLimits, *, every: Every, fps: float | None, live: bool
    ) -> None:
        self._request = request
        self._splitter = ImageSplitter(max_bytes=http.max_bytes)
        self._most_bytes, self._live = http.streams.max_ahead_bytes, live
        self._every, self._fps = every, fps
        self._ahead: deque[_Frame] = deque()
        self._bytes, self._count, self._started_at = 0, 0, 0.0
        self._news = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._failure: ProblemError | None = None
        self._has_ended = False
        self._timeout_s = http.timeout_s
        self.dropped = 0

    async def start(self) -> None:
        """Return once there is a frame; ProblemError if there will be none."""
        self._reading = asyncio.create_task(self._read())
        try:
            frame = await self.next(self._timeout_s)
        except asyncio.TimeoutError:
            raise problems.no_stream(f"no image came within {self._timeout_s:g} s") from None
        if frame is None:
            raise problems.no_stream("the body has no image")
        self._ahead.appendleft(frame)
        self._bytes += len(frame.file)

    async def next(self, wait_s: float) -> _Frame | None:
        """The next frame; None behind the last one.

        Raises asyncio.TimeoutError if none comes in that time, ProblemError if there can be no
        more, GoneError if the caller closed the connection.
        """
        while not self._ahead:
            if self._failure is not None:
                raise self._failure
            if self._has_ended:
                return None
            if self._reading is None or self._reading.done():
                raise GoneError
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), max(wait_s, 0))
        frame = self._ahead.popleft()
        self._bytes -= len(frame.file)
        return frame

    async def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            async for chunk in self._request.stream():
                for file in self._splitter.feed(chunk):
                    self._take(file)
            if self._splitter.has_part and not self._count:
                self._failure = problems.no_stream("the body ends within an image")
            elif self._splitter.has_part:
                self._take(b"", is_cut_off=True)
            self._has_ended = True
        except ImageTooLargeError as error:
            self._failure = problems.too_large(str(error))
        except ImageError as error:
            self._failure = problems.no_stream(str(error))
        except ProblemError as error:
            self._failure = error
            self._ahead.clear()
        except ClientDisconnect:
            return
        finally:
            self._news.set()
        # From now on the connection only tells when it is closed.
        while (await self._request.receive())["type"] != "http.disconnect":
            continue

    @property
    def is_gone(self) -> "asyncio.Task[None]":
        """Is done once the caller has closed the connection."""
        assert self._reading is not None, "start it first"
        return self._reading

    def _take(self, file: bytes, *, is_cut_off: bool = False) -> None:
        now, index = time.monotonic(), self._count
        if index == 0:
            self._started_at = now
        self._count += 1
        time_s = index / self._fps if self._fps else now - self._started_at
        if not (self._every.takes(index, time_s) or is_cut_off):
            return
        self._ahead.append(_Frame(index=index, time_s=time_s, file=file, is_cut_off=is_cut_off))
        self._bytes += len(file)
        while self._bytes > self._most_bytes and len(self._ahead) > 1:
            if not self._live:
                raise problems.too_fast(self._most_bytes)
            self._bytes -= len(self._ahead.popleft().file)
            self.dropped += 1
        self._news.set()


class _Stream:
    """One stream on its way from frames to lines."""

    def __init__(
        self,
        service: Service,
        category: str,
        about: CategoryReport,
        watch: Watch,
        frames: _Frames,
        http: HttpLimits,
    ) -> None:
        self._service = service
        self._category = category
        self._about = about
        self._watch = watch
        self._frames = frames
        self._http = http

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of the answer, each as it is known."""
        end = time.monotonic() + self._http.streams.max_s
        progress_at = time.monotonic() + _PROGRESS_S
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    frame = await self._frames.next(min(end, progress_at) - time.monotonic())
                    if frame is None:
                        break
                    for event in await self._unless_gone(self._watched(frame, end)):
                        yield _line(StreamLine(event=event))
                if time.monotonic() >= end:
                    raise problems.stream_too_long(self._http.streams.max_s)
                if time.monotonic() >= progress_at:
                    yield _line(StreamLine(progress=self._summary()))
                    progress_at = time.monotonic() + _PROGRESS_S
        except GoneError:
            return
        except ProblemError as error:
            yield _line(StreamLine(problem=error.problem))
        for event in self._watch.finish():
            yield _line(StreamLine(event=event))
        yield _line(StreamLine(summary=self._summary()))

    async def _watched(self, frame: _Frame, end: float) -> list[Event]:
        """The events that begin or end with a frame."""
        inspected: Inspected | None = None
        try:
            look = await asyncio.to_thread(self._look, frame)
            if look.verdict == "inspect":
                inspected = await self._inspect(frame, end)
        except ImageError:
            look = Look(verdict="damaged")
        report = inspected.report if inspected else None
        _, events = self._watch.tell(
            look,
            index=frame.index,
            time_s=frame.time_s,
            score=report.anomaly_score if report else None,
            regions=event_regions(report.regions) if report else (),
        )
        decided = (self._about.version, self._about.threshold)
        if report and (report.version, report.threshold) != decided:
            # Another version has taken over, or somebody moved the threshold.
            self._about = await self._service.describe(self._category)
            self._watch.use(_levels(self._about))
        return events

    def _look(self, frame: _Frame) -> Look:
        if frame.is_cut_off:
            return Look(verdict="damaged", is_cut_off=True)
        return self._watch.look(decode_image(frame.file, limits=self._http.image, source="a frame"))

    async def _inspect(self, frame: _Frame, end: float) -> Inspected:
        """Inspect a frame; one that finds the replicas busy waits, and those behind it."""
        asked = InspectionRequest(is_frame=True)
        while True:
            try:
                return await asyncio.wait_for(
                    self._service.inspect(self._category, frame.file, asked), self._http.timeout_s
                )
            except asyncio.TimeoutError:
                pass
            except ProblemError as error:
                if error.problem.status not in (
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    HTTPStatus.TOO_MANY_REQUESTS,
                ):
                    raise
            if time.monotonic() >= end:
                raise problems.stream_too_long(self._http.streams.max_s)
            await asyncio.sleep(_RETRY_S)

    async def _unless_gone(self, work: Awaitable[list[Event]]) -> list[Event]:
        """What `work` gives; it is cancelled if the caller goes away, which raises GoneError."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._frames.is_gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise GoneError
            return await task
        finally:
            task.cancel()

    def _summary(self) -> StreamSummary:
        return StreamSummary(**self._watch.summary.model_dump(), dropped=self._frames.dropped)


def _levels(about: CategoryReport) -> EventLevels:
    return EventLevels.of(about.threshold, about.normal_scores)


def _line(line: StreamLine) -> bytes:
    return f"{line.model_dump_json(exclude_none=True)}\n".encode()

"""The inspections that were kept: the routes of a category's history.

Each node keeps its own; whichever answers tells those.
"""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal, Protocol

from fastapi import Depends, FastAPI, Path, Query, Response
from pydantic import BaseModel, Field

from serving.api.access import INSPECT, Access, Caller, require
from serving.api.bodies import BINARY
from serving.api.messages import RegionReport
from serving.api.problems import COMMON_PROBLEMS, ProblemError

Only = Literal["all", "rejected", "marked", "disagreeing"]
Truth = Literal["good", "defective"]
KeptPicture = Literal["image", "map"]

MOST_LISTED = 200
_LONGEST_NOTE = 500
# What is kept never changes under its number.
_CACHED = {
    "Cache-Control": "private, max-age=86400, immutable",
    "X-Content-Type-Options": "nosniff",
}


class KeptCandidate(BaseModel):
    """What a candidate found in an image."""

    version: int
    score: float = Field(description="Its anomaly score, 0..1.")
    threshold: float
    is_anomalous: bool = Field(description="Its verdict.")


class KeptInspection(BaseModel):
    """An inspection that was kept."""

    id: int = Field(description="Its number; one that was inspected later has a higher one.")
    at: str = Field(description="When, ISO 8601, UTC.")
    category: str
    version: int = Field(description="Version of the prompt set that inspected it.")
    score: float = Field(description="The anomaly score, 0..1.")
    threshold: float = Field(description="That of then.")
    is_anomalous: bool = Field(description="The verdict of then.")
    p_value: float | None
    regions: list[RegionReport] = Field(description="In pixels of the image sent.")
    request_id: str
    width: int = Field(description="Of the image sent, in pixels; what is kept may be smaller.")
    height: int
    mark: Truth | None = Field(description="What a person says that the part is.")
    note: str = Field(description="What that person adds.")
    marked_by: str = Field(description="The name of that person's token.")
    candidate: KeptCandidate | None = Field(
        default=None,
        description="What the candidate that was tried found, if its verdict was another.",
    )


class KeptInspections(BaseModel):
    """Inspections that were kept, newest first."""

    node: str = Field(description="The node that keeps them: another has those that it inspected.")
    inspections: list[KeptInspection]


class Mark(BaseModel):
    """What a person says of an inspected part."""

    verdict: Truth | None = Field(description="What it is; null takes the mark away.")
    note: str = Field(default="", max_length=_LONGEST_NOTE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which inspections are picked: those of a request, or some at random.

    Attributes:
        request_id: the name of the request.
        at_random: how many of all that the history has without gaps, each as likely as any other.
        version: that inspected those.
    """

    request_id: str = ""
    at_random: int = 0
    version: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """An inspection that was picked.

    Attributes:
        jpeg: its image, a JPEG file of at most 1024 pixels a side.
        of_request: how many inspections the request had that are kept.
    """

    inspection: KeptInspection
    jpeg: bytes
    of_request: int


class HistoryService(Protocol):
    """What the routes of a history need. ProblemError if there is none, or not what is named."""

    async def history(
        self, category: str, *, before: int | None, limit: int, only: Only
    ) -> KeptInspections: ...

    async def history_picture(self, category: str, number: int, picture: KeptPicture) -> bytes:
        """A JPEG file of the image, or a PNG file of its anomaly map."""
        ...

    async def mark(self, category: str, number: int, mark: Mark, by: str) -> KeptInspection: ...

    async def pick(self, category: str, wanted: Wanted) -> list[Picked]:
        """Some inspections with their images; none where there are none."""
        ...


def no_history() -> ProblemError:
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        "No history",
        "the fleet keeps no inspections",
        "Set how many it shall keep, `history: {images: 1000}`, in the fleet file, and deploy.",
    )


def unknown_inspection(category: str, number: int, node: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        "Unknown inspection",
        f"{node} keeps no inspection {number} of {category}",
        f"List them again, /v1/{category}/history: old ones are removed, and each node has its"
        " own.",
    )


class NoHistory:
    """A history that is off."""

    async def history(
        self, category: str, *, before: int | None, limit: int, only: Only
    ) -> KeptInspections:
        raise no_history()

    async def history_picture(self, category: str, number: int, picture: KeptPicture) -> bytes:
        raise no_history()

    async def mark(self, category: str, number: int, mark: Mark, by: str) -> KeptInspection:
        raise no_history()

    async def pick(self, category: str, wanted: Wanted) -> list[Picked]:
        return []


NO_HISTORY = NoHistory()


def add_history(api: FastAPI, history: HistoryService, access: Access) -> None:
    """Add the routes of the histories of the categories that `history` answers for."""
    inspectors = require(access, INSPECT)
    number = Path(alias="id", ge=0, le=2**53, description="Its number in the list.")

    @api.get(
        "/v1/{category}/history",
        tags=["history"],
        summary="The last inspections",
        description="Newest first, as the node that answers keeps them; 404 where the fleet file"
        " keeps none (`history`), and no candidate has disagreed (`shadow`).",
        dependencies=[Depends(inspectors)],
        responses=COMMON_PROBLEMS,
    )
    async def list_inspections(
        category: str,
        before: Annotated[
            int | None, Query(ge=0, le=2**53, description="Only those with a lower number.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED, description="At most so many.")] = 50,
        only: Annotated[Only, Query(description="Which of them.")] = "all",
    ) -> KeptInspections:
        return await history.history(category, before=before, limit=limit, only=only)

    @api.get(
        "/v1/{category}/history/{id}/image",
        tags=["history"],
        summary="The image of an inspection",
        description="A JPEG file of at most 1024 pixels a side, upright.",
        dependencies=[Depends(inspectors)],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": BINARY}}, **COMMON_PROBLEMS},
    )
    async def image(category: str, inspection: Annotated[int, number]) -> Response:
        data = await history.history_picture(category, inspection, "image")
        return Response(data, media_type="image/jpeg", headers=_CACHED)

    @api.get(
        "/v1/{category}/history/{id}/map",
        tags=["history"],
        summary="The anomaly map of an inspection",
        description="A PNG file of at most 256 pixels a side, 8-bit gray: 255 is 1.0. It covers the"
        " whole image.",
        dependencies=[Depends(inspectors)],
        response_class=Response,
        responses={200: {"content": {"image/png": BINARY}}, **COMMON_PROBLEMS},
    )
    async def anomaly_map(category: str, inspection: Annotated[int, number]) -> Response:
        data = await history.history_picture(category, inspection, "map")
        return Response(data, media_type="image/png", headers=_CACHED)

    @api.post(
        "/v1/{category}/history/{id}/mark",
        tags=["history"],
        summary="Say what an inspected part really is",
        description="Marked inspections are kept beside the last ones, up to the same number.",
        responses=COMMON_PROBLEMS,
    )
    async def mark_inspection(
        category: str,
        inspection: Annotated[int, number],
        mark: Mark,
        caller: Annotated[Caller, Depends(inspectors)],
    ) -> KeptInspection:
        return await history.mark(category, inspection, mark, caller.name)

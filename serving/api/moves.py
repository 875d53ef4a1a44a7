"""Which version serves, decided over HTTP: the versions of a category, moves of its aliases, and
versions that are made of what people said of inspected images.
"""

from collections.abc import Awaitable
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from pydantic import BaseModel, Field, StringConstraints

from apt_ray.config import CATEGORY_NAME
from apt_ray.errors import RegistryError
from serving.api import problems
from serving.api.access import OPERATE, Access, Caller, require
from serving.api.problems import ProblemError, problem_responses
from serving.controller.client import ControllerClient
from serving.controller.moves import FeedbackUse, MoveKind, MoveOrder, Operation, VersionSummary
from serving.controller.shadow import NotTriedEnoughError

MOST_VERSIONS = 100

# One line; in the dialect of regular expressions that OpenAPI has.
_ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"
Reason = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=3, max_length=500, pattern=_ONE_LINE),
    Field(
        description="Why, in one line; kept in the registry and the audit, with the token's name."
    ),
]
Category = Annotated[str, Path(pattern=f"^{CATEGORY_NAME}$")]
Answer = TypeVar("Answer")

_MOVES: tuple[tuple[MoveKind, str, str], ...] = (
    (
        "promote",
        "Let the candidate serve if it beats the champion",
        "Both are compared on normal images that neither was fitted to, as `apt-ray registry"
        " promote` does; that takes up to minutes.",
    ),
    (
        "discard",
        "Take the alias from the candidate",
        "The version stays in the registry, with the reason.",
    ),
    (
        "roll-back",
        "Let the version serve that served before",
        "A second time goes one further.",
    ),
)


_MAKINGS: tuple[tuple[MoveKind, str, str], ...] = (
    (
        "accept-feedback",
        "Let reported false alarms join the memory, as a new version",
        "Those named, or all that the champion has not taken in and no two callers disagree on, the"
        " lowest scores first. An image with which a confirmed defect would pass is left out.",
    ),
    (
        "calibrate",
        "State the threshold anew by random samples of good parts, as a new version",
        "Of samples (POST /v1/<category>/feedback/samples) of every image of which something was"
        " said. Good parts that were only confirmed do not count: they were chosen.",
    ),
)


class MoveRequest(BaseModel):
    """Why an alias shall move."""

    reason: Reason
    force: bool = Field(
        default=False,
        description="Promote the candidate whatever the comparison says, and however few images it"
        " was tried on; other moves ask nobody.",
    )
    required_images: int | None = Field(
        default=None,
        ge=0,
        description="Promote the candidate only if it agrees with what serves on so many images, on"
        " which it was tried (`shadow`); it may ask for more than the fleet file does.",
    )
    required_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="And on this share of those that it was tried on; without it, as the fleet file"
        " says.",
    )


class FeedbackMoveRequest(FeedbackUse):
    """Of which feedback a version shall be made, and why."""

    reason: Reason
    force: bool = Field(
        default=False, description="Make it whatever confirmed defects would pass then."
    )


class VersionList(BaseModel):
    """Versions of a category, newest first."""

    versions: list[VersionSummary]


async def told(answer: Awaitable[Answer]) -> Answer:
    """What the controller answers; ProblemError if it does not, or if the registry refuses."""
    try:
        return await answer
    except RegistryError as error:
        raise problems.of_registry(error) from None
    except NotTriedEnoughError as error:
        raise problems.not_tried_enough(str(error)) from None
    except Exception as error:
        raise problems.not_ready("the fleet's controller", reason=str(error)) from None


def add_moves(api: FastAPI, controller: ControllerClient, access: Access) -> None:
    """Add the routes by which operators decide which version serves."""
    operators = require(access, OPERATE)
    refusals = problem_responses(
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
    absent = problem_responses(HTTPStatus.NOT_FOUND)
    conflict = problem_responses(HTTPStatus.CONFLICT)

    @api.get(
        "/fleet/categories/{category}/versions",
        tags=["operation"],
        summary="The versions of a category",
        description="Newest first, as the registry has them.",
        dependencies=[Depends(operators)],
        responses=refusals | absent | conflict,
    )
    async def versions(
        category: Category,
        limit: Annotated[
            int, Query(ge=1, le=MOST_VERSIONS, description="At most so many, the newest.")
        ] = 20,
    ) -> VersionList:
        found = await told(controller.versions(category, limit))
        if not found:
            raise ProblemError(
                HTTPStatus.NOT_FOUND,
                "Unknown category",
                f"the registry has no version of {category!r}",
                "Use a category that GET /v1 lists; a search registers the first version of a new"
                " one.",
            )
        return VersionList(versions=found)

    async def _begun(order: MoveOrder, request: Request, response: Response) -> Operation:
        begun = await told(controller.move(order))
        prefix = request.scope["root_path"]
        response.headers["Location"] = f"{prefix}/fleet/operations/{begun.id}"
        return begun

    def add(kind: MoveKind, summary: str, description: str) -> None:
        @api.post(
            f"/fleet/categories/{{category}}/{kind}",
            tags=["operation"],
            summary=summary,
            description=f"{description} The answer is an operation, which Location lets ask for"
            " until it is done. Of each category one is made at a time.",
            status_code=HTTPStatus.ACCEPTED,
            responses=refusals | conflict,
        )
        async def move(
            category: Category,
            asked: MoveRequest,
            caller: Annotated[Caller, Depends(operators)],
            request: Request,
            response: Response,
        ) -> Operation:
            order = MoveOrder(
                kind=kind,
                category=category,
                reason=asked.reason,
                by=caller.name,
                force=asked.force and kind == "promote",
                required_images=asked.required_images,
                required_agreement=asked.required_agreement,
            )
            return await _begun(order, request, response)

    for each in _MOVES:
        add(*each)

    def add_making(kind: MoveKind, summary: str, description: str) -> None:
        @api.post(
            f"/fleet/categories/{{category}}/{kind}",
            tags=["operation"],
            summary=summary,
            description=f"{description} Confirmed defects are the gate: what is rejected of them"
            " must stay rejected. The new version waits as candidate; promoting it goes by that"
            " gate. The answer is an operation, as of a promotion, whose result says what the gate"
            " says.",
            status_code=HTTPStatus.ACCEPTED,
            responses=refusals | conflict,
        )
        async def make(
            category: Category,
            asked: FeedbackMoveRequest,
            caller: Annotated[Caller, Depends(operators)],
            request: Request,
            response: Response,
        ) -> Operation:
            order = MoveOrder(
                kind=kind,
                category=category,
                reason=asked.reason,
                by=caller.name,
                force=asked.force,
                feedback=FeedbackUse(ids=asked.ids, most=asked.most, dry_run=asked.dry_run),
            )
            return await _begun(order, request, response)

    for each in _MAKINGS:
        add_making(*each)

    @api.get(
        "/fleet/operations/{id}",
        tags=["operation"],
        summary="What comes of a move",
        dependencies=[Depends(operators)],
        responses=refusals | absent,
    )
    async def operation(
        identifier: Annotated[str, Path(alias="id", max_length=64)],
    ) -> Operation:
        found = await told(controller.operation(identifier))
        if found is None:
            raise ProblemError(
                HTTPStatus.NOT_FOUND,
                "Unknown operation",
                f"the fleet's controller has begun no operation {identifier!r}",
                "It forgets the oldest, and all when it starts again: what came of yours stands in"
                " GET /fleet/categories/<category>/versions.",
            )
        return found

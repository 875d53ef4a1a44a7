"""The candidate that is tried behind the answers of a category: what came of it so far."""

from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI, Query
from pydantic import Field

from serving.api import problems
from serving.api.access import INSPECT, Access, require
from serving.api.history import MOST_LISTED, HistoryService, KeptInspection
from serving.api.problems import COMMON_PROBLEMS, ProblemError
from serving.controller.client import ControllerClient
from serving.controller.shadow import ShadowStatus


class ShadowFindings(ShadowStatus):
    """What the candidate made of the images, of all replicas, and where it disagreed."""

    category: str
    node: str = Field(description="The node that keeps these: another has those that it inspected.")
    disagreements: list[KeptInspection] = Field(
        description="Images on which both disagree, newest first; `.../history/<id>/image` and"
        " `/map` show them."
    )


def no_shadow(category: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        "No shadow",
        f"no candidate of {category} is tried",
        "Set on which share of the images candidates shall be tried, `shadow: {share: 0.1}`, in the"
        " fleet file, and deploy; then it needs a candidate that is newer than what serves.",
    )


def add_shadow(
    api: FastAPI, controller: ControllerClient, history: HistoryService, access: Access
) -> None:
    """Add the route that tells what candidates make of the images."""

    @api.get(
        "/v1/{category}/shadow",
        tags=["history"],
        summary="What the candidate makes of the same images",
        description="The candidate is tried behind the answers, on a share of the images. Numbers"
        " are of all replicas, told every 10 s; images are those that the node that answers keeps.",
        dependencies=[Depends(require(access, INSPECT))],
        responses=COMMON_PROBLEMS,
    )
    async def shadow(
        category: str,
        limit: Annotated[
            int, Query(ge=1, le=MOST_LISTED, description="At most so many disagreements.")
        ] = 50,
    ) -> ShadowFindings:
        try:
            status = await controller.shadow(category)
        except Exception as error:
            raise problems.not_ready("the fleet's controller", reason=str(error)) from None
        # Asked in any case: it knows which categories there are.
        kept = await history.history(category, before=None, limit=limit, only="disagreeing")
        if status is None:
            raise no_shadow(category)
        # An image of another pair says nothing of this one.
        return ShadowFindings(
            **status.model_dump(),
            category=category,
            node=kept.node,
            disagreements=[
                each
                for each in kept.inspections
                if each.candidate
                and (each.version, each.candidate.version) == (status.champion, status.candidate)
            ],
        )

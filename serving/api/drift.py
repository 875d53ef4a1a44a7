"""Drift of a category's images and scores: an operator has seen to it."""

from typing import Annotated

from fastapi import Depends, FastAPI
from pydantic import Field

from serving.api import problems
from serving.api.access import OPERATE, Access, Caller, require
from serving.api.moves import told
from serving.api.pools import Pools
from serving.api.problems import COMMON_PROBLEMS
from serving.api.thresholds import NOBODY, Because
from serving.controller.client import ControllerClient
from serving.controller.drift import DriftsCleared


class SeenTo(Because):
    """What was done about drift."""

    anew: bool = Field(
        default=False,
        description="Whether images from now on make a new reference; false compares them with the"
        " old one again.",
    )


def add_drift(api: FastAPI, pools: Pools, controller: ControllerClient, access: Access) -> None:
    """Add the route by which operators take back alarms."""

    @api.post(
        "/fleet/categories/{category}/drift/reset",
        tags=["operation"],
        summary="Take back what was said of drift",
        description="For when its cause has gone: the lamp is clean, the camera stands as it stood."
        " If it has not, the alarm is back within some images. Where images shall look from now on"
        " as they do, tune the category again, or let them be the new reference (`anew`). Replicas"
        " follow within seconds.",
        responses=COMMON_PROBLEMS,
    )
    async def reset(
        category: str, seen_to: SeenTo, caller: Annotated[Caller, Depends(require(access, OPERATE))]
    ) -> DriftsCleared:
        if category not in pools.categories:
            raise problems.unknown_category(category, pools.categories)
        return await told(
            controller.reset_drift(
                category, anew=seen_to.anew, reason=seen_to.reason, by=caller.name or NOBODY
            )
        )

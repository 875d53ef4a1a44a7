"""The threshold of a category, set by operators over HTTP.

It is kept in the registry, which every fleet that follows it obeys, and it has a reason.
"""

from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI
from pydantic import BaseModel, Field

from serving.api import problems
from serving.api.access import OPERATE, Access, Caller, require
from serving.api.moves import Reason, told
from serving.api.pools import Pools
from serving.api.problems import COMMON_PROBLEMS, problem_responses
from serving.controller.client import ControllerClient
from serving.controller.orders import CategoryThreshold

_PROBLEMS = {**COMMON_PROBLEMS, **problem_responses(HTTPStatus.CONFLICT)}
NOBODY = "without a token"


class Because(BaseModel):
    """What is done for a reason alone."""

    reason: Reason


class NewThreshold(Because):
    """A threshold that an operator sets."""

    threshold: float = Field(
        ge=0, le=1, description="The anomaly score above which a part is anomalous."
    )


def add_thresholds(
    api: FastAPI, pools: Pools, controller: ControllerClient, access: Access
) -> None:
    """Add the routes by which operators set thresholds."""
    operators = require(access, OPERATE)
    Operator = Annotated[Caller, Depends(operators)]

    def known(category: str) -> None:
        if category not in pools.categories:
            raise problems.unknown_category(category, pools.categories)

    @api.get(
        "/fleet/categories/{category}/threshold",
        tags=["operation"],
        summary="Who says what the threshold is",
        dependencies=[Depends(operators)],
        responses=_PROBLEMS,
    )
    async def threshold(category: str) -> CategoryThreshold:
        known(category)
        return await told(controller.threshold(category))

    @api.put(
        "/fleet/categories/{category}/threshold",
        tags=["operation"],
        summary="Set the threshold",
        description="It is kept in the registry and stands above that of the fleet file and of"
        " every version, on all nodes, until it is set again or removed. Replicas follow within"
        " seconds.",
        responses=_PROBLEMS,
    )
    async def set_threshold(
        category: str, new: NewThreshold, caller: Operator
    ) -> CategoryThreshold:
        known(category)
        return await told(
            controller.set_threshold(
                category, new.threshold, reason=new.reason, by=caller.name or NOBODY
            )
        )

    @api.delete(
        "/fleet/categories/{category}/threshold",
        tags=["operation"],
        summary="Take back the threshold that was set",
        description="That of the fleet file, or of the version, holds again.",
        responses=_PROBLEMS,
    )
    async def remove_threshold(
        category: str, because: Because, caller: Operator
    ) -> CategoryThreshold:
        known(category)
        return await told(
            controller.set_threshold(
                category, None, reason=because.reason, by=caller.name or NOBODY
            )
        )

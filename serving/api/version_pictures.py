"""What was drawn of a version when it was registered: what it makes of its support images and of
perturbed ones, and the plots of its search. The registry has them; people may not reach it."""

from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI, Path, Response
from pydantic import BaseModel, Field

from serving.api.access import OPERATE, Access, require
from serving.api.moves import Category, told
from serving.api.problems import COMMON_PROBLEMS, ProblemError, problem_responses
from serving.controller.client import ControllerClient

Version = Annotated[int, Path(ge=1)]

_PROBLEMS = {**COMMON_PROBLEMS, **problem_responses(HTTPStatus.CONFLICT)}


class VersionPictures(BaseModel):
    """The pictures of a version."""

    pictures: list[str] = Field(
        description="Their names. Of a search: `support_images` and `perturbations`, each above its"
        " anomaly map, and the plots `trials`, `value_over_time`, `slices`, `parallel_coordinates`,"
        " `importances`; with labelled test images also what it makes of those."
    )


def add_version_pictures(api: FastAPI, controller: ControllerClient, access: Access) -> None:
    """Add the routes by which operators see what was drawn of a version."""
    operators = [Depends(require(access, OPERATE))]

    @api.get(
        "/fleet/categories/{category}/versions/{version}/pictures",
        tags=["operation"],
        summary="What was drawn of a version when it was registered",
        dependencies=operators,
        responses=_PROBLEMS,
    )
    async def pictures(category: Category, version: Version) -> VersionPictures:
        found = await told(controller.pictures(category, version))
        if found is None:
            raise ProblemError(
                HTTPStatus.NOT_FOUND,
                "Unknown version",
                f"the registry has no version {version} of {category!r}",
                "Ask for the list of the category's versions.",
            )
        return VersionPictures(pictures=list(found))

    @api.get(
        "/fleet/categories/{category}/versions/{version}/pictures/{name}",
        tags=["operation"],
        summary="One of these pictures",
        dependencies=operators,
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **_PROBLEMS},
    )
    async def picture(category: Category, version: Version, name: str) -> Response:
        found = await told(controller.picture(category, version, name))
        if found is None:
            raise ProblemError(
                HTTPStatus.NOT_FOUND,
                "Unknown picture",
                f"version {version} of {category!r} has no picture {name!r}",
                "Ask for the list of the version's pictures.",
            )
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(found, media_type="image/png", headers=headers)

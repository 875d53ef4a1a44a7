"""What people say of inspected images: given, listed, withdrawn; and images drawn to be judged.

It only collects. What is made of it an operator decides, see `serving/api/moves.py`.
"""

import asyncio
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from apt_ray.config import CATEGORY_NAME
from apt_ray.data.feedback import LABELS, Box, Entry, Feedback, FeedbackStore, Kept, Label
from apt_ray.data.folders import LONGEST_KIND, kind_problem
from apt_ray.errors import DataError, FeedbackError, FeedbackQuotaError, ImageError, WriteError
from apt_ray.files import read_file
from apt_ray.images import ImageLimits, decode_image
from apt_ray.levels import FORMER
from serving.api import problems
from serving.api.access import FEEDBACK, OPERATE, Access, Caller, require
from serving.api.bodies import BINARY, MULTIPART, read_message
from serving.api.history import HistoryService, Picked, Wanted
from serving.api.messages import CategoryReport, Service
from serving.api.problems import COMMON_PROBLEMS, ProblemError, problem_responses
from serving.logs import audit, logger
from serving.settings import HttpLimits

MOST_LISTED = 200
MOST_DRAWN = 200
_MOST_BOXES = 50
_KEPT_WITHIN_S = 2.0
_FIELD = "feedback"
_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
_TYPES = {"png": "png", "jpg": "jpeg", "bmp": "bmp", "tif": "tiff", "webp": "webp"}
_OF_REJECTED: dict[Label, bool] = {
    "false_alarm": True,
    "confirmed_defect": True,
    "missed_defect": False,
    "confirmed_good": False,
}
_INSTEAD: dict[Label, Label] = {
    "false_alarm": "confirmed_good",
    "confirmed_good": "false_alarm",
    "missed_defect": "confirmed_defect",
    "confirmed_defect": "missed_defect",
}
_SEND = (
    "Send the JSON alone, as application/json; or a whole multipart form with it in the field"
    f" `{_FIELD}` and one undamaged PNG, JPEG, BMP, TIFF or WebP file in `image`, as `curl -F"
    f" {_FIELD}='{{...}}' -F image=@part.png` does."
)
_REMEDIES = {
    HTTPStatus.BAD_REQUEST: _SEND,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: _SEND,
    HTTPStatus.REQUEST_TIMEOUT: "Send a smaller image, or none where the fleet has it, or use a"
    " faster connection.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "Send shorter JSON, and one image at most: a smaller or"
    " more compressed one, or raise max_bytes or max_pixels in the fleet file.",
}


def _checked_kind(name: str) -> str:
    if name and (problem := kind_problem(name)):
        raise ValueError(problem)
    return name


def _checked_id(identifier: str) -> str:
    if Entry.of(identifier) is None:
        raise ValueError("this is no id of feedback: take one of the list")
    return identifier


Found = TypeVar("Found")
Kind = Annotated[
    str,
    AfterValidator(_checked_kind),
    WithJsonSchema({"type": "string", "maxLength": LONGEST_KIND}),
]
Id = Annotated[str, Path(alias="id", max_length=128, description="As it stands in the list.")]
Category = Annotated[str, Path(pattern=f"^{CATEGORY_NAME}$")]


class FeedbackRequest(BaseModel):
    """What is said of an inspected image."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(
        min_length=1,
        max_length=128,
        pattern=r"^[\x21-\x7e]+$",
        description="As the answer of the inspection named it.",
    )
    label: Label = Field(
        description="`false_alarm`: a good part that was rejected; `missed_defect`: a defect that"
        " passed; `confirmed_defect` and `confirmed_good`: the verdict was right."
    )
    kind: Kind = Field(
        default="",
        description="Such as scratch, or glare: printable, without a blank at its ends, and not a"
        " name that says that there is no defect, such as good.",
    )
    boxes: list[Box] = Field(
        default=[],
        max_length=_MOST_BOXES,
        description="Where, in pixels of the image that was inspected.",
    )
    note: Annotated[str, StringConstraints(strip_whitespace=True, max_length=500)] = ""
    inspection: int | None = Field(
        default=None,
        ge=0,
        le=2**53,
        description="Its number in the history, where several images came with one request.",
    )


class FeedbackReport(Feedback):
    """What one caller says of one inspected image, and what has come of it."""

    is_disputed: bool = Field(
        default=False, description="Whether another says the opposite: then it is not used."
    )
    is_used: bool = Field(
        default=False, description="Whether the version that serves has taken it in."
    )


class FeedbackList(BaseModel):
    feedback: list[FeedbackReport] = Field(description="Newest first.")


class SampleRequest(BaseModel):
    """How many inspections are to be drawn at random."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: int = Field(ge=1, le=MOST_DRAWN)


class SampleReport(BaseModel):
    """Inspections that were drawn at random."""

    sample: str = Field(description="Its name.")
    version: int | None = Field(description="That inspected them; it counts for that one alone.")
    images: int = Field(description="How many were drawn.")
    left: list[str] = Field(
        description="Of those of which nobody has said anything, or callers disagree, the ids."
    )
    good: int
    defective: int
    is_whole: bool = Field(description="Whether it can count: all that was drawn is judged.")


class SampleList(BaseModel):
    samples: list[SampleReport] = Field(description="Oldest first.")


def _schema() -> dict[str, Any]:
    """Of a request, as OpenAPI wants it: with what it refers to in its place."""
    schema = FeedbackRequest.model_json_schema()
    boxes = schema.pop("$defs")
    schema["properties"]["boxes"]["items"] = boxes["Box"]
    return schema


_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": _schema()},
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": [_FIELD],
                "properties": {
                    _FIELD: {
                        "type": "string",
                        "description": "The same as JSON.",
                    },
                    "image": BINARY["schema"],
                },
            }
        },
    },
}


def add_feedback(
    api: FastAPI,
    store: FeedbackStore | None,
    service: Service,
    history: HistoryService,
    *,
    http: HttpLimits,
    access: Access,
) -> None:
    """Add the routes of feedback on the categories that `service` answers for.

    Args:
        store: where it is kept; None refuses it.
        history: has the images that were inspected.
    """
    givers = require(access, FEEDBACK)
    readers = require(access, FEEDBACK, OPERATE)
    Operator = Annotated[Caller, Depends(require(access, OPERATE))]

    async def opened(category: str) -> tuple[FeedbackStore, CategoryReport]:
        """The store, and what serves the category. ProblemError if there is neither."""
        about = await service.describe(category)
        if store is None:
            raise ProblemError(
                HTTPStatus.NOT_FOUND,
                "No feedback",
                "the fleet takes no feedback",
                "Take `feedback: null` out of the fleet file, and deploy.",
            )
        return store, about

    @api.post(
        "/v1/{category}/feedback",
        tags=["feedback"],
        summary="Say what an inspected part really was",
        description="Scope `feedback`. The image is that of the history; where the fleet does not"
        " have it any more, it comes along: a multipart form with this JSON in the field `feedback`"
        " and the file in `image`. Who says it is the name of the token. Said again of the same"
        " request by the same caller, it takes the place of what was said before. It changes no"
        " verdict until an operator has it used.",
        openapi_extra={"requestBody": _BODY},
        responses={
            **COMMON_PROBLEMS,
            **problem_responses(
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.REQUEST_TIMEOUT,
                HTTPStatus.CONFLICT,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                HTTPStatus.TOO_MANY_REQUESTS,
                HTTPStatus.INSUFFICIENT_STORAGE,
            ),
        },
    )
    async def give(
        category: Category, request: Request, caller: Annotated[Caller, Depends(givers)]
    ) -> FeedbackReport:
        kept, about = await opened(category)
        said, files = await _read(request, http)
        # Before the image is looked for, or looked at.
        await _in_thread(_check, kept, category, caller.name, said, files)
        wanted = Wanted(request_id=said.request_id)
        found = await history.pick(category, wanted)
        drawn = None if found else await _in_thread(_drawn, kept, category, said)
        if not (found or drawn or files):
            found = await _when_kept(history, category, wanted)
        if found:
            picked = _one_of(found, said)
            known, image, suffix = _known(category, picked), picked.jpeg, "jpg"
        elif drawn:
            known = drawn.model_copy(update={"sample": "", "sample_size": 0})
            image, suffix = await _in_thread(_image_of, kept, drawn)
        elif files:
            image = files[0]
            with _explained():
                size, suffix = await _in_thread(_checked, image, http.image)
            known = Feedback(
                category=category,
                request_id=said.request_id,
                label=said.label,
                width=size[0],
                height=size[1],
                source="caller",
            )
        else:
            raise _unknown_request(category, said.request_id)
        _check_verdict(said, known)
        outside = [box for box in said.boxes if not box.is_within((known.width, known.height))]
        if outside:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "Box outside the image",
                f"the box at {outside[0].x}, {outside[0].y} of {outside[0].width} x"
                f" {outside[0].height} pixels is not within {known.width} x {known.height}",
                "Give boxes in pixels of the image that was inspected, as regions are told.",
            )
        meant = known.model_copy(
            update={
                "label": said.label,
                "kind": said.kind,
                "boxes": tuple(said.boxes),
                "note": said.note,
                "by": caller.name,
            }
        )
        given = await _in_thread(kept.give, meant, image, suffix)
        audit("feedback", category=category, id=given.id, by=caller.name)
        (report,) = await _in_thread(_reports, kept, about, [given])
        return report

    @api.get(
        "/v1/{category}/feedback",
        tags=["feedback"],
        summary="What was said of inspected parts",
        description="Scope `feedback` or `operate`. Newest first.",
        dependencies=[Depends(readers)],
        responses=COMMON_PROBLEMS,
    )
    async def list_feedback(
        category: Category,
        before: Annotated[
            Annotated[str, AfterValidator(_checked_id)] | None,
            WithJsonSchema({"type": "string"}),
            Query(max_length=128, description="Only those with a lower id, which are older."),
        ] = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED, description="At most so many.")] = 50,
        label: Annotated[
            Kept | None,
            WithJsonSchema({"type": "string", "enum": [*LABELS, "sampled"]}),
            Query(description="Only those; `sampled` are images that were drawn to be judged."),
        ] = None,
    ) -> FeedbackList:
        kept, about = await opened(category)

        def read() -> list[FeedbackReport]:
            found = kept.page(category, before=before, limit=limit, label=label)
            return _reports(kept, about, found)

        return FeedbackList(feedback=await _in_thread(read))

    @api.post(
        "/v1/{category}/feedback/samples",
        tags=["feedback"],
        summary="Draw inspections at random, to be judged",
        description="Scope `operate`. Of all that the history of the node that answers has of the"
        " version that serves, each as likely as any other. Once something is said of every image"
        " of a sample, its good ones can count as calibration images.",
        responses={**COMMON_PROBLEMS, **problem_responses(HTTPStatus.CONFLICT)},
    )
    async def draw(category: Category, wanted: SampleRequest, caller: Operator) -> SampleReport:
        kept, about = await opened(category)
        if about.counted_share < 1:
            raise ProblemError(
                HTTPStatus.CONFLICT,
                "Region of interest",
                f"{category} is scored within a region of interest, and calibration scores are of"
                " whole images",
                "Calibrate with a folder of good images when it is fitted.",
            )
        picked = await history.pick(
            category, Wanted(at_random=wanted.images, version=about.version)
        )
        if len(picked) < wanted.images:
            raise ProblemError(
                HTTPStatus.CONFLICT,
                "Too few inspections",
                f"the history has {len(picked)} inspections of {category} by version"
                f" {about.version}",
                "Inspect more, draw fewer, or have the fleet keep more, `history: {images: 1000}`"
                " in the fleet file.",
            )
        drawn = [(_known(category, each, by=caller.name), each.jpeg, "jpg") for each in picked]
        found = await _in_thread(kept.draw, drawn)
        audit("feedback sample", category=category, id=found[0].sample, by=caller.name)
        samples = await _in_thread(samples_of, kept, category)
        return next(each for each in samples if each.sample == found[0].sample)

    @api.get(
        "/v1/{category}/feedback/samples",
        tags=["feedback"],
        summary="The samples that were drawn, and how far they are judged",
        dependencies=[Depends(readers)],
        responses=COMMON_PROBLEMS,
    )
    async def list_samples(category: Category) -> SampleList:
        kept, _ = await opened(category)
        return SampleList(samples=await _in_thread(samples_of, kept, category))

    @api.get(
        "/v1/{category}/feedback/{id}/image",
        tags=["feedback"],
        summary="The image that something was said of",
        dependencies=[Depends(readers)],
        response_class=Response,
        responses={200: {"content": {"image/*": BINARY}}, **COMMON_PROBLEMS},
    )
    async def image_of(category: Category, identifier: Id) -> Response:
        kept, _ = await opened(category)
        found = await _in_thread(kept.find, category, identifier)
        if found is None:
            raise _unknown(category, identifier)
        data, suffix = await _in_thread(_image_of, kept, found)
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type=f"image/{_TYPES[suffix]}", headers=headers)

    @api.delete(
        "/v1/{category}/feedback/{id}",
        tags=["feedback"],
        summary="Withdraw what was said",
        description="By whoever said it, or with the scope `operate`. A version that has used it"
        " stays as it is.",
        status_code=HTTPStatus.NO_CONTENT,
        responses=COMMON_PROBLEMS,
    )
    async def withdraw(
        category: Category, identifier: Id, caller: Annotated[Caller, Depends(readers)]
    ) -> None:
        kept, _ = await opened(category)
        found = await _in_thread(kept.find, category, identifier)
        if found is None:
            raise _unknown(category, identifier)
        if found.by != caller.name and OPERATE not in caller.scopes:
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                "Forbidden",
                f"{found.by} said it, and {caller.name} withdraws it",
                "Have that caller withdraw it, or use a token with the scope operate; or give"
                " feedback of your own: what callers disagree on is not used.",
            )
        await _in_thread(kept.withdraw, category, identifier)
        audit("feedback withdrawn", category=category, id=identifier, by=caller.name)


def samples_of(store: FeedbackStore, category: str) -> list[SampleReport]:
    """The samples of a category, and how far they are judged."""
    judged = store.judgements(category)
    found = []
    for name, entries in store.samples(category).items():
        first = store.find(category, entries[0].id)
        truths = {
            entry.id: judged[entry.request].truth if entry.request in judged else None
            for entry in entries
        }
        drawn = first.sample_size if first else 0
        left = [identifier for identifier, truth in truths.items() if truth is None]
        found.append(
            SampleReport(
                sample=name,
                version=first.version if first else None,
                images=drawn,
                left=left,
                good=list(truths.values()).count("good"),
                defective=list(truths.values()).count("defective"),
                is_whole=not left and len(entries) == drawn,
            )
        )
    return found


async def _when_kept(history: HistoryService, category: str, wanted: Wanted) -> list[Picked]:
    """What is wanted, if it is kept within a moment: the history writes after the answer."""
    until = time.monotonic() + _KEPT_WITHIN_S
    found: list[Picked] = []
    while not found and time.monotonic() < until:
        await asyncio.sleep(_KEPT_WITHIN_S / 20)
        found = await history.pick(category, wanted)
    return found


async def _read(request: Request, http: HttpLimits) -> tuple[FeedbackRequest, list[bytes]]:
    with _explained():
        text, files = await read_message(request, http, _FIELD)
        if len(files) > 1:
            raise problems.too_many_images(1)
    try:
        return FeedbackRequest.model_validate_json(text, strict=True), files
    except ValidationError as error:
        raise problems.invalid(
            problems.described(error.errors()),
            "Correct what is named: the JSON has the fields request_id and label, and may have"
            " kind, boxes, note and inspection, as /docs describes them.",
        ) from None


@contextmanager
def _explained() -> Iterator[None]:
    """What is wrong with a body, with the remedies for feedback."""
    try:
        yield
    except (ImageError, ProblemError) as error:
        found = problems.of_image(error) if isinstance(error, ImageError) else error
        remedy = _REMEDIES.get(HTTPStatus(found.problem.status), found.problem.remedy)
        told = found.problem.model_copy(update={"remedy": remedy})
        raise ProblemError.of(told, found.headers) from None


def _check(
    store: FeedbackStore, category: str, by: str, said: FeedbackRequest, files: list[bytes]
) -> None:
    store.check(category, by, _names(said), size=sum(map(len, files)))


def _one_of(found: list[Picked], said: FeedbackRequest) -> Picked:
    """The one inspection that is meant."""
    numbers = [each.inspection.id for each in found]
    if said.inspection is None and len(found) == 1:
        return found[0]
    for each in found:
        if each.inspection.id == said.inspection:
            return each
    if said.inspection is None:
        raise ProblemError(
            HTTPStatus.CONFLICT,
            "Several inspections",
            f"{len(found)} images came with the request {said.request_id}",
            f"Say which one is meant: `inspection`, its number in the history, one of"
            f" {', '.join(map(str, numbers))}.",
        )
    raise ProblemError(
        HTTPStatus.NOT_FOUND,
        "Unknown inspection",
        f"the request {said.request_id} has no inspection {said.inspection}",
        f"It has {', '.join(map(str, numbers))}.",
    )


def _known(category: str, picked: Picked, *, by: str = "") -> Feedback:
    """What the history says of an inspection, before anybody says anything of it."""
    inspection = picked.inspection
    name = inspection.request_id
    return Feedback(
        category=category,
        request_id=name if picked.of_request == 1 else _one_name(name, inspection.id),
        label="sampled",
        by=by,
        width=inspection.width,
        height=inspection.height,
        source="history",
        version=inspection.version,
        score=inspection.score,
        threshold=inspection.threshold,
    )


def _one_name(request_id: str, inspection: int) -> str:
    """The name of one of several images that came with one request."""
    return f"{request_id}#{inspection}"


def _names(said: FeedbackRequest) -> list[str]:
    """Under which what is said may be kept."""
    found = [said.request_id]
    if said.inspection is not None:
        found.append(_one_name(said.request_id, said.inspection))
    return found


def _drawn(store: FeedbackStore, category: str, said: FeedbackRequest) -> Feedback | None:
    """The image that is meant, if it is in a sample: the history may have lost it since."""
    found = (store.drawn(category, name) for name in _names(said))
    return next(filter(None, found), None)


def _check_verdict(said: FeedbackRequest, known: Feedback) -> None:
    """ProblemError if the label is said of the other verdict."""
    if known.score is None or known.threshold is None:
        return
    was_rejected = known.score > known.threshold
    if _OF_REJECTED[said.label] != was_rejected:
        raise ProblemError(
            HTTPStatus.CONFLICT,
            "Other verdict",
            f"the part of request {said.request_id} {'was rejected' if was_rejected else 'passed'}"
            f" with {known.score:.3f}, and {said.label} is said of one that was not",
            f"Say {_INSTEAD[said.label]} if that is meant.",
        )


def _checked(data: bytes, limits: ImageLimits) -> tuple[tuple[int, int], str]:
    """Size of an image that was sent, and suffix of its kind; ImageError if it is none."""
    image = decode_image(data, limits=limits, reading=FORMER)  # its levels matter to no size
    with Image.open(io.BytesIO(data)) as file:
        return image.size, _SUFFIXES[file.format or ""]


def _image_of(store: FeedbackStore, found: Feedback) -> tuple[bytes, str]:
    return read_file(store.path(found)), found.image.rpartition(".")[2]


def _reports(
    store: FeedbackStore, about: CategoryReport, found: list[Feedback]
) -> list[FeedbackReport]:
    disputed = {
        entry.id
        for judgement in store.judgements(about.category).values()
        if judgement.truth is None
        for entry in judgement.entries
    }
    return [
        FeedbackReport(
            **each.model_dump(), is_disputed=each.id in disputed, is_used=each.id in about.feedback
        )
        for each in found
    ]


def _unknown(category: str, identifier: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        "Unknown feedback",
        f"there is no feedback {identifier!r} on {category}",
        f"List it, GET /v1/{category}/feedback: it may have been withdrawn, or be too old.",
    )


def _unknown_request(category: str, request_id: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.NOT_FOUND,
        "Unknown request",
        f"the fleet has no image of {category} of a request {request_id!r}",
        "Send the image along, as the file `image` of a form with the JSON in its field"
        " `feedback`; or have the fleet keep inspections, `history: {images: 1000}` in the fleet"
        " file. Each node keeps its own.",
    )


async def _in_thread(work: Callable[..., Found], *args: object) -> Found:
    """What `work`, which waits for disks or S3, gives; its errors as problems."""
    try:
        return await asyncio.to_thread(work, *args)
    except FeedbackQuotaError as error:
        raise ProblemError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "Feedback quota",
            str(error),
            "Wait; or, where too much is kept, withdraw some of it. How much one caller may say"
            " stands under feedback in the fleet file.",
            headers={"Retry-After": str(error.retry_after_s)},
        ) from None
    except FeedbackError as error:
        raise ProblemError(
            HTTPStatus.INSUFFICIENT_STORAGE,
            "Feedback full",
            str(error),
            "Have it used and withdrawn, or raise images or mib under feedback in the fleet file.",
        ) from None
    except (DataError, WriteError) as error:
        # Where it lies is no caller's business.
        logger.error("feedback cannot be read or kept: %s", error)
        raise ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "Feedback unavailable",
            "what the fleet keeps of feedback cannot be read or written",
            "Ask again later. If it lasts, the fleet's logs say why: whoever runs it mends"
            " permissions, room or S3, or names another folder under feedback in the fleet file.",
            headers={"Retry-After": "10"},
        ) from None

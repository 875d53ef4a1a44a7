"""What the fleet answers, and what passes between its routes and its replicas."""

from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, Field

from apt_ray.video.part import PartView
from serving.api.problems import Problem
from serving.settings import ThresholdSource


class RegionReport(BaseModel):
    """One connected area above the threshold, in pixels of the image sent."""

    x: int = Field(description="Left edge of its box.")
    y: int = Field(description="Upper edge of its box.")
    width: int
    height: int
    peak: float = Field(description="Highest value of the anomaly map in it, 0..1.")
    area: int = Field(description="How many pixels are above the threshold.")


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    receive: float = Field(description="Reading the request's body.")
    decode: float = Field(description="Image file to pixels.")
    queue: float = Field(description="Waiting for the batch that it was inspected in.")
    inspect: float = Field(description="That batch's forward pass and scores.")
    conclude: float = Field(description="Regions, and the map or overlay.")


class InspectionReport(BaseModel):
    """What an inspection found."""

    category: str
    version: int = Field(description="Version of the category's prompt set in the registry.")
    backbone: str
    anomaly_score: float = Field(description="0..1, higher is worse.")
    threshold: float = Field(description="The anomaly score above which a part is anomalous.")
    is_anomalous: bool = Field(description="The verdict.")
    p_value: float | None = Field(
        description="Share of good parts that look at least as unusual; null without calibration"
        " images."
    )
    certified_false_alarm_rate: float | None = Field(
        description="At most this share of good parts is called anomalous; null where the threshold"
        " promises nothing."
    )
    regions: list[RegionReport] = Field(description="Where, worst first.")
    kinds: dict[str, float] = Field(
        default={},
        description="Kind of defect -> probability that the most anomalous part shows it; empty of"
        " a good part, and where the category was shown no confirmed defects.",
    )
    width: int = Field(default=0, description="Of the image sent, upright, in pixels.")
    height: int = Field(default=0, description="Likewise.")
    request_id: str = ""
    timings_ms: Timings
    map_png: str | None = Field(
        default=None, description="The image asked for with ?map=, a PNG file in base64."
    )


class InspectionReports(BaseModel):
    """What was found in several images, in the order in which they were sent."""

    inspections: list[InspectionReport | Problem] = Field(
        description="A report for each image, or the problem with it."
    )


class CategoryReport(BaseModel):
    """What answers for a category."""

    category: str
    version: int = Field(description="Version of its prompt set in the registry.")
    run_id: str = Field(description="The registry's run that made the version.")
    backbone: str
    fingerprint: str = Field(description="Digest of the backbone's weights and preprocessing.")
    threshold: float
    threshold_source: ThresholdSource = Field(
        default="prompt set", description="Who says what the threshold is."
    )
    certified_false_alarm_rate: float | None
    normal_scores: list[float] = Field(
        default=[],
        description="Anomaly scores of good parts, lowest first, that its prompt set's threshold is"
        " from; of more than 500, 500 evenly taken. Those of the whole image, also with a region of"
        " interest.",
    )
    normal_scores_of: str = Field(
        default="",
        description="Which good parts: `calibration images`, `left-out support images` or `copies"
        " of the support image`. New parts score like the first alone.",
    )
    counted_share: float = Field(
        default=1.0,
        description="Share of an image that counts; below 1 with a region of interest.",
    )
    part: PartView | None = Field(
        default=None,
        description="What one whole part looks like in a frame of a stream; null where the support"
        " images show no part on a ground, or the prompt set holds none of them.",
    )
    shots: int = Field(description="How many normal images it was tuned on.")
    trained_at: str = Field(description="When, ISO 8601, UTC.")
    settings: dict[str, object] = Field(description="How it was tuned.")
    metrics: dict[str, float] = Field(description="How well it does, measured at tuning time.")
    feedback: list[str] = Field(
        default=[], description="Ids of the feedback that the version has taken in."
    )


class NearestPatch(BaseModel):
    """The place of the support images that a region is most like."""

    image: str = Field(description="Name of the support image's file.")
    x: int = Field(description="Left edge of its box, in pixels of `width` and `height`.")
    y: int = Field(description="Upper edge.")
    box_width: int
    box_height: int
    width: int = Field(description="Of the small copy that the prompt set holds of that image.")
    height: int
    distance: float = Field(
        description="How far the region's worst place is from it, in standard deviations of what"
        " good parts are from one another: about 0 for good ones."
    )
    picture_jpeg: str = Field(description="The box, a JPEG file in base64.")


class ResemblanceReport(BaseModel):
    """A kind of self-generated anomaly, and how much a region is like it."""

    family: str = Field(description="Its name, such as `crack`, `blot` or `erase`.")
    about: str = Field(description="What it looks like.")
    similarity: float = Field(
        description="Cosine of the directions in which both leave the normal features, -1..1."
    )


class ExplainedRegion(RegionReport):
    """A region, what it looks like, and what it should have looked like."""

    picture_jpeg: str = Field(
        description="The region with some of what is around it, a JPEG file in base64."
    )
    nearest: NearestPatch | None = Field(
        description="Null where the prompt set holds no copies of its support images: see `note`."
    )
    resembles: list[ResemblanceReport] = Field(
        description="The 3 kinds of self-generated anomalies that it is most like, the first most:"
        " a hint, not a finding. Empty where `nearest` is null."
    )


class Explanation(BaseModel):
    """What a verdict rests on."""

    category: str
    version: int
    anomaly_score: float
    threshold: float
    is_anomalous: bool
    width: int = Field(description="Of the image sent, upright, in pixels.")
    height: int
    regions: list[ExplainedRegion] = Field(description="The worst 5; none of a good part.")
    prompts_map_png: str = Field(
        description="What the learned prompts find unusual: 8-bit gray, 255 is 1.0, at most 256"
        " pixels a side, stretched over the image; a PNG file in base64."
    )
    memory_map_png: str = Field(
        description="What no support image explains: the distances to the reference memory, alike."
    )
    note: str = Field(default="", description="What is missing, and the remedy.")


Picture = Literal["png", "overlay"]
"""What may be drawn: the anomaly map, or the image with it tinted over."""

Alias = Literal["candidate", "champion"]
"""Whose version may be asked for beside the one that serves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectionRequest:
    """What a caller wants to know of an image.

    Attributes:
        id: the name of the request.
        picture: what is to be drawn, if anything.
        picture_side: the longer side that the picture may have, in pixels; None leaves it the
            image's.
        timeout_s: by when; None leaves it to the service how long an image may wait.
        alias: whose version is to answer, as it would serve; None asks the one that serves.
        is_frame: whether it is one of many that follow one another, of which no history is kept,
            and from which no drift can be told.
    """

    id: str = ""
    picture: Picture | None = None
    picture_side: int | None = None
    timeout_s: float | None = None
    alias: Alias | None = None
    is_frame: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """What a replica found in one image: the report, to be completed, and the picture asked for."""

    report: InspectionReport
    picture_png: bytes | None


class Service(Protocol):
    """What the routes of a category need: it runs in their process or is reached from it."""

    async def describe(self, category: str) -> CategoryReport: ...

    async def inspect(self, category: str, data: bytes, asked: InspectionRequest) -> Inspected:
        """Inspect an image file; whoever cancels this costs no forward pass.

        Raises ImageError for bytes that are no acceptable image, ProblemError if the category or
        its alias is not known or the image cannot be inspected in time.
        """
        ...

    async def explain(self, category: str, data: bytes, asked: InspectionRequest) -> Explanation:
        """Say what the verdict on an image rests on; raises as `inspect`."""
        ...

"""Moves of a category's aliases that somebody asks the fleet for, versions that are made of what
people said, and its versions to choose from.

A move is an *operation*: it is begun, and looked at until it is done. The controller knows those of
its own life; what came of them stands in the registry.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from apt_ray.config import FitSettings, Settings
from apt_ray.data.feedback import MOST_AT_ONCE, Feedback
from apt_ray.errors import FleetError
from serving.settings import CategoryName, FeedbackSettings

if TYPE_CHECKING:
    from apt_ray.registry import RegisteredVersion, Registry

MoveKind = Literal["promote", "discard", "roll-back", "accept-feedback", "calibrate"]
NEED_A_BACKBONE: tuple[MoveKind, ...] = ("promote", "accept-feedback", "calibrate")
"""What encodes images, which takes up to minutes of a core."""

_MOST = 32
_SHOTS = "shots"
_SUBMISSION = "ray.submission_id"  # as tuning/search.py tags the versions of a job


class FeedbackUse(Settings):
    """Which feedback a version is made of."""

    ids: tuple[str, ...] = Field(
        default=(), description="Empty: all false alarms that are not used yet."
    )
    most: int = Field(default=MOST_AT_ONCE, ge=1, le=_MOST, description="So many of them at most.")
    dry_run: bool = Field(
        default=False, description="Whether it is only said what would come of it."
    )


class MoveOrder(Settings):
    """What shall happen to a category's aliases."""

    kind: MoveKind
    category: CategoryName
    reason: str
    by: str = Field(description="The name of the caller's token; empty without tokens.")
    force: bool = Field(
        default=False, description="Whether the candidate is promoted whatever its verdict is."
    )
    required_images: int | None = Field(
        default=None,
        description="On which candidate and champion have to agree; null: as the fleet file says.",
    )
    required_agreement: float | None = Field(
        default=None, description="Share of the tried images on which they have to agree, likewise."
    )
    version: int | None = Field(
        default=None, description="The one to be promoted; null: whatever is the candidate then."
    )
    feedback: FeedbackUse | None = Field(
        default=None, description="Of what a version is made, where one is made."
    )

    @property
    def why(self) -> str:
        """For the registry, whose own record of who moves an alias is the controller's machine."""
        return f"{self.reason} ({self.by or 'a caller'}, through the fleet)"


class MoveResult(Settings):
    """What came of a move."""

    moved: bool = Field(description="False if the champion was kept.")
    version: int = Field(
        description="The version that was promoted, discarded or rolled back to; that was made of"
        " feedback and waits as candidate, 0 if it was only tried."
    )
    verdict: str = Field(
        default="",
        description="Of a promotion: `promoted`, `kept` or `uncomparable`. Of feedback: `passes` or"
        " `refused`, as confirmed defects say.",
    )
    why: str = Field(description="The verdict in words, or the reason.")
    report: str = Field(default="", description="Its figures, as Markdown.")
    passed_over: tuple[tuple[str, str], ...] = Field(
        default=(), description="Feedback that was not used, by id, each with the reason."
    )


class Operation(Settings):
    """A move that was asked for."""

    id: str
    kind: MoveKind
    category: CategoryName
    reason: str
    by: str
    force: bool
    feedback: FeedbackUse | None = None
    started: str = Field(description="When, ISO 8601, UTC.")
    state: Literal["running", "done", "failed"] = "running"
    result: MoveResult | None = Field(default=None, description="Once it is done.")
    error: str | None = Field(default=None, description="Why it failed, and the remedy.")


class VersionSummary(Settings):
    """A version of a category, as the registry knows it."""

    version: int
    aliases: tuple[str, ...]
    created: str = Field(description="When it was registered, ISO 8601, UTC; empty if unknown.")
    shots: int | None = Field(description="How many normal images it was fitted to.")
    validation: float | None = Field(description="Validation value, 0..1, higher is better.")
    settings: dict[str, str] = Field(description="Those of its fit that are not the defaults.")
    verdict: str = Field(
        description="What its last comparison with a champion said: `promoted`, `kept` or"
        " `uncomparable`; empty without any."
    )
    difference: str = Field(description="Of the two validation values, with its standard error.")
    judged_on: str = Field(description="Images and champion of that comparison.")
    discarded: str = Field(description="Why it was discarded, and by whom; empty if it was not.")
    served_since: str = Field(
        description="When it last became the champion, ISO 8601, UTC; empty if it never was, or by"
        " hand."
    )
    by: str = Field(description="Who made it that.")
    reason: str = Field(description="And why.")
    search: str = Field(
        default="", description="The search of the fleet that made it, or another job of Ray."
    )
    link: str | None = Field(
        default=None, description="Its page in the registry, if the fleet file has registry.page."
    )


def carry_out(
    registry: "Registry", order: MoveOrder, *, feedback: FeedbackSettings | None = None
) -> MoveResult:
    """Make a move. One of `NEED_A_BACKBONE` takes up to minutes.

    Raises RegistryError, or another AptError if a version or a store cannot be used.

    Args:
        feedback: where it lies; None where the fleet takes none.
    """
    from apt_ray.registry import CANDIDATE, discard, promote, roll_back

    if order.feedback is not None:
        return _use_feedback(registry, order, order.feedback, feedback)

    if order.kind == "promote":
        promotion = promote(
            registry,
            order.category,
            CANDIDATE if order.version is None else str(order.version),
            why="" if order.force else order.why,
            force=order.why if order.force else None,
        )
        return MoveResult(
            moved=promotion.move is not None,
            version=promotion.candidate,
            verdict=promotion.verdict,
            why=promotion.why,
            report=promotion.report(),
        )
    if order.kind == "discard":
        discarded = discard(registry, order.category, why=order.why)
        return MoveResult(moved=True, version=discarded.version, why=order.reason)
    move = roll_back(registry, order.category, why=order.why)
    return MoveResult(moved=True, version=move.target, why=order.reason)


def _use_feedback(
    registry: "Registry", order: MoveOrder, use: FeedbackUse, settings: FeedbackSettings | None
) -> MoveResult:
    from apt_ray.registry.acceptance import report
    from apt_ray.registry.feedback import accept_feedback, calibrate_by_samples

    if settings is None:
        raise FleetError("the fleet takes no feedback: take `feedback: null` out of the fleet file")
    store = settings.store()
    if order.kind == "accept-feedback":
        found = accept_feedback(
            registry,
            store,
            order.category,
            why=order.why,
            ids=use.ids,
            most=use.most,
            callers=settings.callers,
            force=order.force,
            dry_run=use.dry_run,
        )
    else:
        found = calibrate_by_samples(
            registry,
            store,
            order.category,
            why=order.why,
            force=order.force,
            dry_run=use.dry_run,
        )
    gate = found.accepted.gate
    return MoveResult(
        moved=False,
        version=found.accepted.version or 0,
        verdict="refused" if gate.passing else "passes",
        why=gate.why,
        report=report(
            found.accepted,
            [_named(each) for each in found.given],
            [_named(each) for each in found.defects],
        ),
        passed_over=found.passed_over,
    )


def _named(given: Feedback) -> str:
    """An image as people know it."""
    return f"{given.request_id}{f' by {given.by}' if given.by else ''}"


def versions_of(
    registry: "Registry", category: str, *, limit: int, page: str | None
) -> list[VersionSummary]:
    """The newest versions of a category, newest first; none of an unknown one.

    Raises RegistryError.

    Args:
        page: the address of the registry for people, if it has one.
    """
    newest = registry.versions(category)[:limit]
    if not newest:
        return []
    moves = {move.target: move for move in registry.history(category).moves}
    defaults = {name: str(value) for name, value in FitSettings().model_dump().items()}

    def summary(registered: "RegisteredVersion") -> VersionSummary:
        tags, settings = registered.tags, registered.settings
        move = moves.get(registered.version)
        path = registry.page(category, registered.version)
        return VersionSummary(
            version=registered.version,
            aliases=registered.aliases,
            created=registered.created,
            shots=int(settings[_SHOTS]) if _SHOTS in settings else None,
            validation=registered.metrics.get("validation"),
            settings={
                name: settings[name]
                for name in defaults
                if name in settings and settings[name] != defaults[name]
            },
            verdict=tags.get("verdict", ""),
            difference=tags.get("difference", ""),
            judged_on=tags.get("judged_on", ""),
            discarded=tags.get("discarded", ""),
            served_since=move.at if move else "",
            by=move.who if move else "",
            reason=move.why if move else "",
            search=tags.get(_SUBMISSION, ""),
            link=f"{page.rstrip('/')}/{path}" if page and path else None,
        )

    return [summary(registry.resolve(category, str(version))) for version in newest]

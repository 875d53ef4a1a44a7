"""Moves of a category's aliases that somebody asks the fleet for, and its versions to choose from.

A move is an *operation*: it is begun, and looked at until it is done. The controller knows those of
its own life; what came of them stands in the registry.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from apt_ray.config import FitSettings, Settings
from serving.settings import CategoryName

if TYPE_CHECKING:
    from apt_ray.registry import RegisteredVersion, Registry

MoveKind = Literal["promote", "discard", "roll-back"]
_SHOTS = "shots"
_SUBMISSION = "ray.submission_id"  # as tuning/search.py tags the versions of a job


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

    @property
    def why(self) -> str:
        """For the registry, whose own record of who moves an alias is the controller's machine."""
        return f"{self.reason} ({self.by or 'a caller'}, through the fleet)"


class MoveResult(Settings):
    """What came of a move."""

    moved: bool = Field(description="False if the champion was kept.")
    version: int = Field(description="The version that was promoted, discarded or rolled back to.")
    verdict: str = Field(
        default="", description="Of a promotion: `promoted`, `kept` or `uncomparable`."
    )
    why: str = Field(description="The verdict in words, or the reason.")
    report: str = Field(default="", description="Of a promotion: its figures, as Markdown.")


class Operation(Settings):
    """A move that was asked for."""

    id: str
    kind: MoveKind
    category: CategoryName
    reason: str
    by: str
    force: bool
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


def carry_out(registry: "Registry", order: MoveOrder) -> MoveResult:
    """Make a move. A promotion compares two versions, which takes a backbone and up to minutes.

    Raises RegistryError, or another AptError if a version cannot be used.
    """
    from apt_ray.registry import CANDIDATE, discard, promote, roll_back

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

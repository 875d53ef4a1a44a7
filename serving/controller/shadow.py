"""What replicas say of candidates that they try behind their answers, and what is kept of it.

Each replica counts by itself and tells its whole count every time, under a name of its own: told
twice, it counts once, and what a replica has told outlives it. The controller keeps the counts on
its disk. They are of one *pair*, what serves and the candidate; another pair begins anew.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from pydantic import Field

from apt_ray.config import Settings
from apt_ray.errors import FleetError
from serving.settings import CategoryName

SHIFT_STEP = 0.005
"""The width of a bin of score shifts; the middle one is around 0."""

_MOST_COUNTS = 64  # of replicas, beyond which the oldest are added up


class NotTriedEnoughError(FleetError):
    """A candidate has not been tried on what its promotion asks for."""


class ShadowOrder(Settings):
    """The candidate that a pool shall try on a category's images."""

    champion: int = Field(description="The version that serves, whatever its alias.")
    candidate: int
    share: float = Field(description="Of the images, 0..1.")
    pair: str = Field(description="Name of what serves and the candidate, as `pair_of` gives it.")


class ShadowCounts(Settings):
    """Images that champion and candidate have both scored."""

    both_pass: int = 0
    both_reject: int = 0
    candidate_rejects: int = Field(default=0, description="Images that it alone rejects.")
    champion_rejects: int = Field(default=0, description="Images that it alone rejects.")
    dropped: int = Field(default=0, description="Chosen images for which there was no time.")
    shift: float = Field(default=0, description="Sum of the score shifts.")
    shifts: dict[int, int] = Field(
        default_factory=dict, description="Bin of `SHIFT_STEP` -> images; only those with any."
    )

    @property
    def agreeing(self) -> int:
        return self.both_pass + self.both_reject

    @property
    def images(self) -> int:
        return self.agreeing + self.candidate_rejects + self.champion_rejects

    def plus(self, other: "ShadowCounts") -> "ShadowCounts":
        """Both together."""
        values = self.model_dump()
        shifts = dict(self.shifts)
        for place, images in other.shifts.items():
            shifts[place] = shifts.get(place, 0) + images
        numbers = other.model_dump(exclude={"shifts"})
        added = {name: values[name] + number for name, number in numbers.items()}
        return ShadowCounts(**added, shifts=shifts)


class ShadowReport(Settings):
    """What one replica has found in the images of a category."""

    id: str = Field(description="Of this count; another replica's, or a later one, has another.")
    pair: str
    since: str | None = Field(description="Of the first image, ISO 8601, UTC; null before it.")
    counts: ShadowCounts
    is_loaded: bool = Field(default=False, description="Whether the candidate is there.")
    problem: str | None = Field(default=None, description="Why the candidate cannot be tried.")


class ShadowStatus(Settings):
    """What the candidate of a category makes of the images that the champion answers for."""

    champion: int = Field(description="The version that serves.")
    candidate: int = Field(description="The version that is tried behind the answers.")
    share: float = Field(description="Of the images that are tried, 0..1.")
    since: str | None = Field(
        description="When the first image was tried by this pair, ISO 8601, UTC; null before it."
    )
    images: int = Field(description="Images that both have scored.")
    agreement: float | None = Field(
        description="Share of them with the same verdict, 0..1; null without any."
    )
    both_pass: int
    both_reject: int
    candidate_rejects: int = Field(description="Images that the candidate alone rejects.")
    champion_rejects: int = Field(description="Images that the champion alone rejects.")
    dropped: int = Field(description="Images of the share that there was no time for.")
    replicas: int = Field(description="Replicas that try it now: those with traffic.")
    shift_mean: float | None = Field(description="Mean of candidate's score - champion's.")
    shift_p05: float | None = Field(description="Quantiles of the same, to 0.0025.")
    shift_p50: float | None
    shift_p95: float | None
    problem: str | None = Field(
        default=None, description="Why a replica cannot try the candidate, and the remedy."
    )


class KeptShadow(Settings):
    """What is known of the candidate of one category."""

    order: ShadowOrder
    since: str | None = None
    counts: dict[str, ShadowCounts] = Field(
        default_factory=dict,
        description="By the name of each; the one heard of last comes last, and those that were"
        " added up have no name.",
    )

    @property
    def sum(self) -> ShadowCounts:
        total = ShadowCounts()
        for counts in self.counts.values():
            total = total.plus(counts)
        return total


class KeptShadows(Settings):
    """What is known of all candidates."""

    categories: dict[CategoryName, KeptShadow] = Field(default_factory=dict)


class Shadows:
    """The candidates of all categories that are tried.

    Args:
        kept: what an earlier controller knew.
    """

    def __init__(self, kept: KeptShadows | None = None) -> None:
        self._categories = dict((kept or KeptShadows()).categories)

    @property
    def kept(self) -> KeptShadows:
        """All that is known, to be kept."""
        return KeptShadows(categories=dict(self._categories))

    def follow(
        self, orders: Mapping[str, ShadowOrder]
    ) -> tuple[list[str], dict[str, ShadowStatus]]:
        """Try these from now on.

        Returns the categories for which something is tried anew, and what was found where something
        is tried no more.
        """
        begun, ended = [], {}
        for category, known in list(self._categories.items()):
            if category not in orders or orders[category].pair != known.order.pair:
                ended[category] = _status(self._categories.pop(category))
        for category, order in orders.items():
            if category not in self._categories:
                begun.append(category)
            known = self._categories.get(category) or KeptShadow(order=order)
            self._categories[category] = known.model_copy(update={"order": order})
        return begun, ended

    def hear(self, category: str, report: ShadowReport) -> None:
        """What a replica says; of another pair than the one that is tried, it says nothing."""
        known = self._categories.get(category)
        if known is None or known.order.pair != report.pair:
            return
        counts = {name: each for name, each in known.counts.items() if name != report.id}
        counts[report.id] = report.counts
        while len(counts) > _MOST_COUNTS:
            oldest = next(name for name in counts if name)
            counts[""] = counts.get("", ShadowCounts()).plus(counts.pop(oldest))
        starts = [since for since in (known.since, report.since) if since]
        self._categories[category] = known.model_copy(
            update={"counts": counts, "since": min(starts, default=None)}
        )

    def status(self, category: str, reports: Iterable[ShadowReport]) -> ShadowStatus | None:
        """What is known of the candidate of a category, with what its replicas say now; None where
        none is tried."""
        known = self._categories.get(category)
        if known is None:
            return None
        return _status(known, [each for each in reports if each.pair == known.order.pair])

    def require(
        self, category: str, *, images: int, agreement: float, champion: int, candidate: int
    ) -> None:
        """NotTriedEnoughError, with the numbers, unless both agree on so many images, which are
        this share of those that were tried."""
        known = self._categories.get(category)
        is_tried = known is not None and known.order.candidate == candidate
        counts = known.sum if known and is_tried else ShadowCounts()
        if counts.agreeing >= images and counts.agreeing / max(counts.images, 1) >= agreement:
            return
        share = f" ({counts.agreeing / counts.images:.2%})" if counts.images else ""
        raise NotTriedEnoughError(
            f"version {candidate} of {category} agrees with version {champion}, which serves, on"
            f" {counts.agreeing:,} of {counts.images:,} images{share}; its promotion asks for"
            f" {images:,} on which both agree, and for {agreement:.2%} of those that were tried"
        )


def shift_bin(shift: float) -> int:
    """The bin of a score shift in -1..1."""
    return round(shift / SHIFT_STEP)


def _status(known: KeptShadow, reports: Sequence[ShadowReport] = ()) -> ShadowStatus:
    counts = known.sum
    low, middle, high = _quantiles(counts.shifts, (0.05, 0.5, 0.95))
    return ShadowStatus(
        champion=known.order.champion,
        candidate=known.order.candidate,
        share=known.order.share,
        since=known.since,
        images=counts.images,
        agreement=counts.agreeing / counts.images if counts.images else None,
        shift_mean=counts.shift / counts.images if counts.images else None,
        shift_p05=low,
        shift_p50=middle,
        shift_p95=high,
        replicas=sum(report.is_loaded for report in reports),
        problem=next((report.problem for report in reports if report.problem), None),
        **counts.model_dump(
            include={"both_pass", "both_reject", "candidate_rejects", "champion_rejects", "dropped"}
        ),
    )


def _quantiles(shifts: Mapping[int, int], levels: Sequence[float]) -> list[float | None]:
    """The middles of the bins that hold them; None without any image."""
    places = sorted(shifts)
    up_to = list(accumulate(shifts[place] for place in places))
    if not up_to:
        return [None for _ in levels]
    return [
        round(SHIFT_STEP * places[bisect_left(up_to, level * up_to[-1])], 6) for level in levels
    ]
